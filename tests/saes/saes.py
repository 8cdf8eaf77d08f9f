"""Small SAELens SAEs for the tests: random ones of every architecture, and ones whose answers are known."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TrainingSAE

from sae_transfer.saes.training import new_sae

SPARSITY = {
    "standard": ("l1_coefficient", 1.0),
    "gated": ("l1_coefficient", 1.0),
    "topk": ("k", 8),
    "batchtopk": ("k", 8),
    "jumprelu": ("l0_coefficient", 0.1),
}
ARCHITECTURES = tuple(SPARSITY)


def random_training_sae(architecture: str, d_in: int = 32, d_sae: int = 96, *, b_dec: bool = False) -> TrainingSAE[Any]:
    """Random weights in every parameter, so that a fold that forgets one shows."""
    key, value = SPARSITY[architecture]
    options = {"apply_b_dec_to_input": b_dec}
    sae = new_sae(
        architecture,
        d_in=d_in,
        d_sae=d_sae,
        sparsity_key=key,
        sparsity_value=value,
        seed=0,
        sparsity_warmup_steps=0,
        options=options,
        metadata={},
        device="cpu",
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if architecture == "jumprelu":
            sae.get_parameter("threshold").fill_(0.6)
        if architecture == "batchtopk":
            sae.get_buffer("topk_threshold").fill_(1.3)
    return sae


def identity_sae(d: int = 32, *, decoder_scale: float = 1.0) -> StandardSAE:
    """Features are the positive and negative parts of each coordinate; the decoder puts them together again."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
    eye = torch.eye(d)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0) * decoder_scale)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


def save_inference(sae: TrainingSAE[Any] | SAE[Any], directory: Path) -> Path:
    """Write an SAE as SAELens itself does, without any file of ours."""
    sae.save_inference_model(directory) if isinstance(sae, TrainingSAE) else sae.save_model(directory)
    return directory
