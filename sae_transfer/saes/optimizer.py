"""Adam as SAELens's trainer uses it, gradient clipping included, in one pass over the weights."""

from typing import Any

import torch
from torch.nn.utils import get_total_norm

CLIP_NORM = 1.0  # SAELens's, fixed in its trainer


class ClippingAdam(torch.optim.Adam):
    """Fused Adam that clips the norm of all gradients together to `CLIP_NORM` first.

    Clipping is a factor on every gradient, and the fused kernel divides by a factor anyway (`grad_scale`, made for
    mixed precision): so it costs one pass for the norm and no other. The gradients are left scaled, by the same kernel.
    """

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float]) -> None:
        """Over parameters of one device, float32."""
        super().__init__(parameters, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip and update; every parameter has its gradient."""
        assert closure is None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        # as torch.nn.utils.clip_grad_norm_ does it: the factor is CLIP_NORM / (norm + 1e-6), and never above one
        self.grad_scale = ((get_total_norm(grads) + 1e-6) / CLIP_NORM).clamp_(min=1.0)
        super().step()
