"""The faster trainer: SAELens's trainer in its numbers, its statistics and its saved state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_transfer.saes import gradients
from sae_transfer.saes.trainer import FastTrainer
from sae_transfer.saes.training import new_sae
from tests.saes.saes import ARCHITECTURES, SPARSITY

D_IN, D_SAE, BATCH = 16, 256, 96


def batches(n: int) -> Iterator[torch.Tensor]:
    """Sparse sums of fixed directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_IN, generator=generator)
    for _ in range(n):
        codes = torch.rand(BATCH, 40, generator=generator) * (torch.rand(BATCH, 40, generator=generator) < 0.1)
        yield codes @ directions


def new(architecture: str) -> TrainingSAE[Any]:
    key, value = ("l1_coefficient", 10.0) if architecture == "standard" else SPARSITY[architecture]
    return new_sae(
        architecture,
        d_in=D_IN,
        d_sae=D_SAE,
        sparsity_key=key,
        sparsity_value=value,
        seed=0,
        sparsity_warmup_steps=20,
        options={"apply_b_dec_to_input": False},
        metadata={},
        device="cpu",
    )


def configured(n_steps: int = 120, dead_after: int = 1000, lr: float = 3e-3) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=n_steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=10,
        lr_decay_steps=30,
        device="cpu",
        autocast=False,
        feature_sampling_window=50,
        dead_feature_window=dead_after,
    )


def run(trainer: SAETrainer[Any, Any], given: Iterator[torch.Tensor]) -> list[float]:
    """Losses of each step."""
    losses = []
    for batch in given:
        trainer.maybe_reset_sparsity()
        losses.append(trainer.step(batch).loss.item())
        trainer.n_training_steps += 1
    return losses


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The way of each block, as training goes."""
    taken: list[str] = []
    for name in ("add_sparse", "add_dense"):
        method = getattr(gradients.Gradients, name)

        def noting(self: Any, *args: Any, _name: str = name, _method: Any = method) -> None:
            taken.append(_name)
            _method(self, *args)

        monkeypatch.setattr(gradients.Gradients, name, noting)
    return taken


# topk's auxiliary loss comes in once features are dead
@pytest.mark.parametrize("dead_after", [15, 1000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forty_steps_are_those_of_saelens(architecture: str, dead_after: int) -> None:
    ours = FastTrainer(configured(40, dead_after), new(architecture))
    plain = SAETrainer(configured(40, dead_after), new(architecture), iter(()))
    torch.testing.assert_close(run(ours, batches(40)), run(plain, batches(40)), rtol=1e-4, atol=0)
    assert ours.n_training_samples == plain.n_training_samples
    assert ours.n_frac_active_samples == plain.n_frac_active_samples
    assert torch.equal(ours.n_forward_passes_since_fired, plain.n_forward_passes_since_fired)
    # a feature at the edge of being active may fall on either side of it
    assert (ours.act_freq_scores - plain.act_freq_scores).abs().sum() <= 1e-3 * plain.act_freq_scores.sum()
    for (name, a), b in zip(ours.sae.named_parameters(), plain.sae.parameters(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm(), name
    assert ours.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    assert ours.get_coefficients() == plain.get_coefficients()


def test_a_standard_sae_goes_from_dense_to_sparse_as_its_l0_falls(ways: list[str]) -> None:
    run(FastTrainer(configured(), new("standard")), batches(120))
    assert ways[0] == "add_dense" and ways[-1] == "add_sparse"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cut_and_resumed_is_the_uncut_training_bit_for_bit(architecture: str, tmp_path: Path, ways: list[str]) -> None:
    whole = FastTrainer(configured(dead_after=40), new(architecture))
    losses = run(whole, batches(120))
    switch = ways.index("add_sparse") if "add_sparse" in ways else 60
    for cut in sorted({1, max(switch, 1), switch + 1, 60, 100}):
        first = FastTrainer(configured(dead_after=40), new(architecture))
        given = batches(120)
        head = run(first, (next(given) for _ in range(cut)))
        directory = tmp_path / str(cut)
        first.save_trainer_state(directory)
        second = FastTrainer(configured(dead_after=40), new(architecture))
        second.sae.load_state_dict(first.sae.state_dict())
        second.load_trainer_state(directory)
        assert head + run(second, given) == losses, cut
        for name, tensor in whole.sae.state_dict().items():
            assert torch.equal(second.sae.state_dict()[name], tensor), (cut, name)
        for ours, theirs in zip(whole.optimizer.state.values(), second.optimizer.state.values(), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        assert torch.equal(second.act_freq_scores, whole.act_freq_scores)
        assert torch.equal(second.n_forward_passes_since_fired, whole.n_forward_passes_since_fired)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_bfloat16_steps_learn_as_well(architecture: str, device: str) -> None:
    config = configured()
    config.autocast, config.device = True, device
    losses = run(FastTrainer(config, new(architecture).to(device)), batches(120))
    exact = run(FastTrainer(configured(), new(architecture)), batches(120))
    assert losses[-1] == pytest.approx(exact[-1], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_on_a_gpu_bfloat16_autograd_learns_as_well(architecture: str) -> None:
    config = configured()
    config.autocast, config.device = True, "cuda"
    losses = run(FastTrainer(config, new(architecture).to("cuda")), batches(120))
    exact = run(FastTrainer(configured(), new(architecture)), batches(120))
    assert losses[-1] == pytest.approx(exact[-1], rel=0.05)


def test_counters_are_float32_while_another_thread_loads_a_bfloat16_model() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        trainer = FastTrainer(configured(), new("standard"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert trainer.n_forward_passes_since_fired.dtype == trainer.act_freq_scores.dtype == torch.float32


def test_tf32_is_for_training_alone(gpu: str) -> None:
    config = configured()
    config.device = gpu
    trainer = FastTrainer(config, new("standard").to(gpu))
    inside = []
    plain = trainer._gradients
    trainer._gradients = lambda x: (inside.append(torch.get_float32_matmul_precision()), plain(x))[1]
    trainer.step(next(batches(1)))
    assert inside == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"
