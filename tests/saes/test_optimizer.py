"""Fused Adam with clipping folded in: the updates of Adam after clip_grad_norm_."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from sae_transfer.saes.optimizer import ClippingAdam


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((30, 7), (7, 30), (30,))
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(device)) for shape in shapes]


def set_gradients(to: list[torch.nn.Parameter], step: int, norm: float) -> None:
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, generator=generator) for p in to]
    total = torch.cat([grad.flatten() for grad in grads]).norm()
    for parameter, grad in zip(to, grads, strict=True):
        parameter.grad = (grad * (norm / total)).to(parameter.device)


@pytest.mark.parametrize("norms", [[0.3], [50.0], [0.3, 50.0, 1.0, 0.0]], ids=["below", "above", "both"])
def test_updates_are_those_of_adam_after_clipping(norms: list[float], device: str) -> None:
    ours, plain = parameters(device), parameters()
    clipping, adam = ClippingAdam(ours, lr=0.01, betas=(0.9, 0.999)), torch.optim.Adam(plain, lr=0.01)
    for step in range(40):
        for each in (ours, plain):
            set_gradients(each, step, norms[step % len(norms)])
        clip_grad_norm_(plain, 1.0)
        clipping.step()
        adam.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2e-6)


def test_a_gradient_that_is_not_finite_spoils_the_weights_as_it_does_in_adam() -> None:
    ours = parameters()
    optimizer = ClippingAdam(ours, lr=0.01, betas=(0.9, 0.999))
    set_gradients(ours, 0, float("nan"))
    optimizer.step()
    assert all(parameter.isnan().all() for parameter in ours)
