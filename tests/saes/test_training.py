"""Training: SAELens's own steps, folded at the end, refused when it blows up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_transfer.errors import StudyError, is_out_of_memory
from sae_transfer.saes.training import Diverged
from tests.saes.saes import ARCHITECTURES
from tests.saes.trainings import ALWAYS, Cut, GivenStream, files_of, fresh, steps_of, train, trainee


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss_and_leaves_a_ready_sae(architecture: str, tmp_path: Path) -> None:
    train([trainee(tmp_path / architecture, architecture)], GivenStream())
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
    train([trainee(tmp_path / f"together-{a}", a) for a in ("standard", "topk")], GivenStream())
    for architecture in ("standard", "topk"):
        train([trainee(tmp_path / f"alone-{architecture}", architecture)], GivenStream())
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
    train([trainee(tmp_path / "b", "batchtopk")], GivenStream())
    assert "60 steps are few for its threshold" in caplog.text
    sae = SAE.load_from_disk(tmp_path / "b")
    raw = torch.cat(list(GivenStream().batches(40))) / 0.5
    l0 = (sae.encode(raw) > 0).sum(-1).float().mean()
    assert 4 < l0 < 16  # k is 8; from zero, the moving average would leave far more active


def log_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "train_log.jsonl").read_text().splitlines()]


def test_a_blow_up_stops_that_sae_at_its_batch_and_no_other(tmp_path: Path) -> None:
    blown = trainee(tmp_path / "blown", "standard")
    with torch.no_grad():
        blown.sae.W_dec[0, 0] = float("nan")
    with pytest.raises(Diverged, match="training blown: the loss is nan at batch 0; nothing was stored") as caught:
        train([blown, trainee(tmp_path / "sound", "standard")], GivenStream())
    assert caught.value.directories == (tmp_path / "blown",) and "the other SAEs are stored" in str(caught.value)
    train([trainee(tmp_path / "alone", "standard")], GivenStream())
    for name in ("sae_weights.safetensors", "provenance.json", "train_log.jsonl"):
        assert (tmp_path / "sound" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "blown").iterdir()) == ["train_log.jsonl"]


def test_nan_in_the_middle_leaves_the_last_good_checkpoint_and_retries_from_it(tmp_path: Path) -> None:
    with pytest.raises(
        Diverged, match=r"(?s)the loss is nan at batch 23; .* checkpoint of step (\d+) is kept.*--retry-lr 0.005"
    ):
        train([trainee(tmp_path / "sae", "standard")], GivenStream(spoil_at=23), every_min=ALWAYS)
    assert steps_of(tmp_path / "sae") == [22]  # that of step 23 was followed by no good batch
    train([trainee(tmp_path / "sae", "standard")], GivenStream(), retry_lr=0.002)
    provenance = json.loads((tmp_path / "sae" / "provenance.json").read_text())
    assert provenance["lr_changes"] == [{"step": 22, "lr": 0.002}]
    lrs = {entry["step"]: entry["lr"] for entry in log_of(tmp_path / "sae")}
    assert list(lrs) == list(range(1, 61))
    assert lrs[22] == 0.01 and lrs[23] == 0.002
    # the decay keeps its shape: the last fifth of the steps, to zero
    assert lrs[48] == pytest.approx(0.002) and lrs[54] == pytest.approx(0.001) and lrs[60] == pytest.approx(0, abs=1e-9)


def test_the_learning_rate_of_a_retry_holds_when_it_is_cut_itself(tmp_path: Path) -> None:
    for name in ("through", "cut"):
        with pytest.raises(Diverged):
            train([trainee(tmp_path / name, "topk")], GivenStream(spoil_at=23), every_min=ALWAYS)
    train([trainee(tmp_path / "through", "topk")], GivenStream(), retry_lr=0.002)
    with pytest.raises(Cut):
        train([trainee(tmp_path / "cut", "topk")], GivenStream(cut_at=40), retry_lr=0.002)  # no checkpoint of its own
    with pytest.raises(Cut):
        train([trainee(tmp_path / "cut", "topk")], GivenStream(cut_at=50), retry_lr=0.002, every_min=ALWAYS)
    train([trainee(tmp_path / "cut", "topk")], GivenStream())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "through")


def test_the_curve_of_a_retry_is_told_from_its_start_also_when_it_was_cut_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    heard = replace(trainee(tmp_path / "sae", "standard"), on_log=lambda _, entry: told.append(entry["step"]))
    with pytest.raises(Diverged):
        train([trainee(tmp_path / "sae", "standard")], GivenStream(spoil_at=23), every_min=ALWAYS)

    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("sae_transfer.saes.checkpoints.Checkpoint.restore", cut)
        with pytest.raises(Cut):
            train([heard], GivenStream(), retry_lr=0.002)
    train([heard], GivenStream(), retry_lr=0.002)
    assert told == list(range(23, 61))


def test_an_explosion_is_told_from_learning(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the MSE is [\d.e+]+ times the activations' mean squared norm at batch"):
        train([trainee(tmp_path / "sae", "standard")], GivenStream(), lr=1.0, every_min=ALWAYS)
    assert not (tmp_path / "sae" / "provenance.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_says_what_to_lower_and_keeps_checkpoints(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"(?s)out of memory .*\n.*lower train.batch_size .* fewer SAEs share"):
        train([trainee(tmp_path / "sae", "standard")], GivenStream(fail_at=(20, error)), every_min=ALWAYS)
    assert steps_of(tmp_path / "sae") == [19, 20]


def test_memory_that_is_really_short_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_are_not_taken_for_short_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        train([trainee(tmp_path / "sae", "standard")], GivenStream(fail_at=(20, RuntimeError("a bug"))))
