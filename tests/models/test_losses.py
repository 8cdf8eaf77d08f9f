"""Tiled losses against the plain computation over all logits, in float64."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from sae_transfer.models import losses
from sae_transfer.models.losses import clean_losses, spliced_losses, surprisals
from sae_transfer.models.splice import Head

N, D_MODEL, D_VOCAB = 30, 16, 50


class Unembedding:
    """What `Head` takes of a model."""

    def __init__(self, bias: bool, softcap: float | None, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.linear = torch.nn.Linear(D_MODEL, D_VOCAB, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(D_VOCAB, D_MODEL, generator=generator))
        self.config = SimpleNamespace(final_logit_softcapping=softcap)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.linear


class Plain(NamedTuple):
    """From all logits at once."""

    ce_clean: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor


def plain(model: Unembedding, clean: torch.Tensor, spliced: torch.Tensor, targets: torch.Tensor) -> Plain:
    def log_probabilities(hidden: torch.Tensor) -> torch.Tensor:
        bias = model.linear.bias
        logits = hidden.double() @ model.linear.weight.double().T + (0 if bias is None else bias.double())
        cap = model.config.final_logit_softcapping
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    with torch.no_grad():
        log_p, log_q = log_probabilities(clean), log_probabilities(spliced)
    return Plain(
        -log_p.gather(-1, targets[:, None])[:, 0],
        -log_q.gather(-1, targets[:, None])[:, 0],
        (log_p.exp() * (log_p - log_q)).sum(-1),
        (log_p.argmax(-1) == log_q.argmax(-1)).double(),
    )


def hidden_states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean and unrelated hidden states, and targets."""
    generator = torch.Generator().manual_seed(1)
    clean, other = (torch.randn(N, D_MODEL, generator=generator) for _ in range(2))
    return clean, other, torch.randint(D_VOCAB, (N,), generator=generator)


@pytest.fixture(params=[(7, 11), (1, 50), (64, 64)], ids=["ragged tiles", "a row at a time", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TILE", {"cpu": request.param})


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("by", [1.0, 1e-2, 1e-4])
def test_tiled_losses_equal_those_from_all_logits(bias: bool, softcap: float | None, by: float) -> None:
    model = Unembedding(bias, softcap)
    clean, other, targets = hidden_states()
    spliced = clean.lerp(other, by)
    expected = plain(model, clean, spliced, targets)
    head = Head(model)
    reference = clean_losses(head, clean, targets)
    ours = spliced_losses(head, reference, spliced)
    torch.testing.assert_close(reference.ce, expected.ce_clean, atol=5e-6, rtol=0)
    torch.testing.assert_close(ours.ce, expected.ce, atol=5e-6, rtol=0)
    torch.testing.assert_close(ours.kl, expected.kl, atol=5e-6, rtol=1e-6)
    assert torch.equal(ours.agrees, expected.agrees)
    assert expected.agrees.mean() < 0.6 or by < 1  # the unrelated pass is one that disagrees


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_an_unchanged_pass_loses_nothing(softcap: float | None) -> None:
    clean, _, targets = hidden_states()
    head = Head(Unembedding(True, softcap))
    reference = clean_losses(head, clean, targets)
    same = spliced_losses(head, reference, clean.clone())
    assert torch.equal(same.ce, reference.ce) and not same.kl.any() and bool(same.agrees.all())


def test_logits_too_large_to_exponentiate_are_summed() -> None:
    model = Unembedding(False, None)
    clean, other, targets = hidden_states()
    reference = clean_losses(Head(model), clean * 100, targets)
    expected = plain(model, clean * 100, other * 100, targets)
    ours = spliced_losses(Head(model), reference, other * 100)
    torch.testing.assert_close(reference.ce, expected.ce_clean, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(ours.kl, expected.kl, atol=1e-3, rtol=1e-5)


def test_losses_of_a_bfloat16_unembedding_are_those_of_its_values() -> None:
    model = Unembedding(True, None, torch.bfloat16)
    clean, other, targets = (tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in hidden_states())
    expected = plain(model, clean, other, targets)
    reference = clean_losses(Head(model), clean, targets)
    ours = spliced_losses(Head(model), reference, other)
    torch.testing.assert_close(reference.ce, expected.ce_clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.kl, expected.kl, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_surprisals_of_one_state_are_those_of_all_logits(softcap: float | None) -> None:
    model = Unembedding(True, softcap)
    clean, other, _ = hidden_states()
    everything = surprisals(Head(model), clean[0])
    for token in (0, 17, D_VOCAB - 1):
        expected = plain(model, clean[:1], other[:1], torch.tensor([token])).ce_clean
        assert everything[token].item() == pytest.approx(expected.item(), abs=1e-12)
