"""Training: SAELens's own steps, folded at the end, refused when it blows up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_transfer.errors import StudyError
from sae_transfer.saes.training import Schedule, Trainee, new_sae, train_saes
from tests.saes.saes import ARCHITECTURES, SPARSITY

PROVENANCE = {"trained_on": "base", "sparsity_key": "k", "sparsity_value": 8, "seed": 0, "role": "trained"}


class GivenStream:
    """Batches of a low-rank signal, made from a seed."""

    def __init__(self, n_batches: int = 60, batch_size: int = 64, spoil_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(n_batches * batch_size, 6, generator=generator).relu()
        data = codes @ torch.randn(6, 16, generator=generator)
        self._data = data * 4 / data.norm(dim=-1).mean()
        self.n_batches, self.batch_size, self._spoil_at = n_batches, batch_size, spoil_at

    def batches(self, start: int = 0) -> Iterator[torch.Tensor]:
        for n in range(start, self.n_batches):
            batch = self._data[n * self.batch_size : (n + 1) * self.batch_size]
            yield batch * float("nan") if n == self._spoil_at else batch


def fresh(architecture: str, seed: int = 0, warmup: int = 0) -> Any:
    key, value = SPARSITY[architecture]
    return new_sae(
        architecture,
        d_in=16,
        d_sae=64,
        sparsity_key=key,
        sparsity_value=value,
        seed=seed,
        sparsity_warmup_steps=warmup,
        options={"apply_b_dec_to_input": False},
        metadata={},
        device="cpu",
    )


def train(trainees: list[Trainee], stream: Any, lr: float = 1e-2) -> None:
    train_saes(trainees, stream, Schedule(lr, 0.0, 0.2), norm_scale=0.5, autocast=False, device="cpu", label="train")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss_and_leaves_a_ready_sae(architecture: str, tmp_path: Path) -> None:
    train([Trainee(tmp_path / architecture, fresh(architecture), PROVENANCE)], GivenStream())
    log = [json.loads(line) for line in (tmp_path / architecture / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["explained_variance"] > 0.5
    assert {"step", "tokens", "loss", "mse_loss", "l0", "explained_variance", "dead_features", "lr"} <= set(log[0])
    assert log[-1]["lr"] < 1e-3  # decayed to zero
    sae = SAE.load_from_disk(tmp_path / architecture)
    raw = next(GivenStream().batches()) / 0.5  # c = 0.5 was folded in
    explained = 1 - (sae(raw) - raw).square().sum() / (raw - raw.mean(0)).square().sum()
    assert explained > 0.5


def test_several_saes_on_one_stream_are_those_trained_alone(tmp_path: Path) -> None:
    train([Trainee(tmp_path / f"together-{a}", fresh(a), PROVENANCE) for a in ("standard", "topk")], GivenStream())
    for architecture in ("standard", "topk"):
        train([Trainee(tmp_path / f"alone-{architecture}", fresh(architecture), PROVENANCE)], GivenStream())
        together, alone = (SAE.load_from_disk(tmp_path / f"{how}-{architecture}") for how in ("together", "alone"))
        for name, tensor in alone.state_dict().items():
            assert torch.equal(together.state_dict()[name], tensor), name


def test_initial_weights_are_the_posts_and_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, same, other = fresh("standard", 0), fresh("standard", 0), fresh("standard", 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.W_dec, same.W_dec) and not torch.equal(one.W_dec, other.W_dec)
    torch.testing.assert_close(one.W_dec.norm(dim=-1), torch.full((64,), 0.1))
    assert torch.equal(one.W_enc, one.W_dec.T)
    assert not one.b_enc.any() and not one.b_dec.any()


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_the_sparsity_coefficient_warms_up(architecture: str) -> None:
    coefficients = fresh(architecture, warmup=7).get_coefficients()
    assert [c.warm_up_steps for c in coefficients.values()] == [7]


def test_batchtopk_starts_its_threshold_at_the_first_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train([Trainee(tmp_path / "b", fresh("batchtopk"), PROVENANCE)], GivenStream())
    assert "60 steps are few for its threshold" in caplog.text
    sae = SAE.load_from_disk(tmp_path / "b")
    raw = torch.cat(list(GivenStream().batches(40))) / 0.5
    l0 = (sae.encode(raw) > 0).sum(-1).float().mean()
    assert 4 < l0 < 16  # k is 8; from zero, the moving average would leave far more active


def test_nan_stops_training_at_its_batch_and_stores_nothing(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="training nan: the loss is nan at batch 23; nothing was stored"):
        train([Trainee(tmp_path / "nan", fresh("standard"), PROVENANCE)], GivenStream(spoil_at=23))
    assert sorted(path.name for path in (tmp_path / "nan").iterdir()) == ["train_log.jsonl"]
