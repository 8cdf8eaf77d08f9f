"""Streamed losses against the plain computation over all logits."""

import pytest
import torch

from sae_transfer.models import losses
from sae_transfer.models.losses import next_token_losses
from sae_transfer.models.splice import Head


class Unembedding:
    """What `Head` takes of a model."""

    def __init__(self, bias: bool, softcap: float | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.linear = torch.nn.Linear(16, 50, bias=bias)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(50, 16, generator=generator))
        self.config = type("Config", (), {"final_logit_softcapping": softcap})()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_streamed_losses_equal_those_from_all_logits(
    bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 50 * 7)
    monkeypatch.setattr(losses, "MIN_POSITIONS", 1)  # slices of 7 positions, the last one short
    model = Unembedding(bias, softcap)
    generator = torch.Generator().manual_seed(1)
    clean, other = (torch.randn(30, 16, generator=generator) for _ in range(2))
    targets = torch.randint(50, (30,), generator=generator)
    ce, (spliced, same) = next_token_losses(Head(model), targets, clean, [other, clean])
    with torch.no_grad():
        z, y = model.linear(clean), model.linear(other)
        if softcap is not None:
            z, y = softcap * torch.tanh(z / softcap), softcap * torch.tanh(y / softcap)
    expected = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    torch.testing.assert_close(ce, expected)
    torch.testing.assert_close(spliced.ce, torch.nn.functional.cross_entropy(y, targets, reduction="none"))
    kl = torch.nn.functional.kl_div(y.log_softmax(-1), z.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(spliced.kl, kl, atol=1e-5, rtol=1e-5)
    assert torch.equal(spliced.agrees, (z.argmax(-1) == y.argmax(-1)).float())
    assert torch.equal(same.ce, ce) and not same.kl.any() and bool(same.agrees.all())
