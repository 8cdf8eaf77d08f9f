"""Exact restart of a study, through the pipeline and the command line, by real signals."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.pipeline import run_stages
from sae_transfer.saes import stream
from sae_transfer.saes.stream import ActivationStream
from sae_transfer.study_file import load_study
from tests.studies import Started, cli, write_study

SAES = (
    "base-standard-w64-l1_1-s0",
    "base-topk-w48-k8-s0",
    "finetuned-standard-w64-l1_1-s0-1024",
    "finetuned-topk-w48-k8-s0-1024",
)
STAGES = ("train", "finetune")


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory, llama_pair: tuple[Path, Path], text_file: Path) -> Path:
    return write_study(
        tmp_path_factory.mktemp("study"),
        *llama_pair,
        text_file,
        saes=[{"widths": [64], "l1_coefficient": [1]}, {"architecture": "topk", "widths": [48], "k": [8]}],
        train={"models": ["base"], "tokens": 4096, "batch_size": 16, "lr": 1e-3, "scale_tokens": 2048},
        finetune={"tokens": [1024], "batch_size": 16},
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 512 activations: 32 batches, 16 sequences that run in 4 passes."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 512 * 4 * 32)
    monkeypatch.setattr(stream, "CPU_PASS_TOKENS", 128)


def saes_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("saes/*/*")) if path.is_file()}


def at_batch(n: int) -> tuple[str, Callable[..., bool]]:
    return "batch", lambda self, batch: batch == n


def in_block(index: int) -> tuple[str, Callable[..., bool]]:
    return "_load", lambda self, block: block == index


@pytest.mark.parametrize("where", [at_batch(32), at_batch(50), at_batch(230), in_block(2), in_block(0)])
def test_a_stop_anywhere_in_training_changes_nothing(
    where: tuple[str, Callable[..., bool]],
    study_file: Path,
    small_blocks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    study, uncut = load_study(study_file), tmp_path / "uncut"
    run_stages(study, uncut, ("train",))
    name, is_here = where
    original = getattr(ActivationStream, name)

    def signalled(self: ActivationStream, n: int) -> object:
        if is_here(self, n):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, n)

    with monkeypatch.context() as patch, signals.installed():
        patch.setattr(ActivationStream, name, signalled)
        with pytest.raises(signals.Stopped):
            run_stages(study, tmp_path / "run", ("train",))
    assert not (tmp_path / "run" / "stages" / "train-base.json").exists()
    run_stages(study, tmp_path / "run", ("train",))
    assert saes_of(tmp_path / "run") == saes_of(uncut)
    assert len(saes_of(uncut)) == 2 * 4


@pytest.mark.slow
def test_a_killed_and_a_preempted_run_end_as_the_one_that_was_left_alone(study_file: Path, tmp_path: Path) -> None:
    run, often = tmp_path / "run", ("--set", "compute.checkpoint_every_min=0.0005")
    command = ("train", study_file, "--out", run, *often)
    killed = Started(*command)
    killed.wait_for(lambda: any(run.glob("saes/base-topk*/checkpoints/*")))
    killed.send_signal(signal.SIGKILL)
    assert killed.end().returncode == -signal.SIGKILL
    preempted = Started(*command)
    preempted.wait_for(lambda: any(run.glob("saes/base-topk*/checkpoints/[1-9][0-9]")))
    preempted.send_signal(signal.SIGUSR2)
    ended = preempted.end()
    assert ended.returncode == 75 and "stopped by SIGUSR2; finished stages are kept" in ended.stderr
    last = cli(*command)
    assert last.returncode == 0, last.stderr
    run_stages(load_study(study_file), tmp_path / "uncut", ("train",))
    assert saes_of(run) == saes_of(tmp_path / "uncut")


def test_checkpoints_of_other_settings_are_refused_and_force_starts_anew(
    study_file: Path, small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    batch = ActivationStream.batch

    def signalled(self: ActivationStream, n: int) -> object:
        if n == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, n)

    with monkeypatch.context() as patch, signals.installed():
        patch.setattr(ActivationStream, "batch", signalled)
        with pytest.raises(signals.Stopped):
            run_stages(load_study(study_file), run, ("train",))
    before = {path: path.read_bytes() for path in (run / "study.yaml", *run.glob("saes/**/*")) if path.is_file()}
    other = load_study(study_file, ["train.lr=0.002"])
    with pytest.raises(StudyError, match=r"(?s)checkpoints/40: belongs to another training.*: schedule\n.*--force"):
        run_stages(other, run, ("train",))
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in run.glob("saes/**/*") if path.is_file()} < set(before)
    run_stages(other, run, ("train",), force=True)
    run_stages(other, tmp_path / "uncut", ("train",))
    assert saes_of(run) == saes_of(tmp_path / "uncut")


def test_a_finished_training_done_again_by_force_starts_from_scratch(
    study_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, run = load_study(study_file), tmp_path / "run"
    run_stages(study, run, ("train",))
    before = saes_of(run)
    stamp = (run / "saes" / SAES[0] / "sae_weights.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO")
    run_stages(study, run, ("train",), force=True)
    assert "trained already" not in caplog.text and saes_of(run) == before
    assert (run / "saes" / SAES[0] / "sae_weights.safetensors").stat().st_mtime_ns > stamp


def test_one_lost_sae_is_trained_again_alone(
    study_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, run = load_study(study_file), tmp_path / "run"
    run_stages(study, run, STAGES)
    before = saes_of(run)
    assert {Path(name).parts[1] for name in before} == set(SAES)
    shutil.rmtree(run / "saes" / SAES[1])
    caplog.set_level("INFO")
    run_stages(study, run, STAGES)
    assert f"{SAES[0]}: trained already" in caplog.text and saes_of(run) == before


def test_a_retry_without_a_checkpoint_is_refused(study_file: Path, tmp_path: Path) -> None:
    study = load_study(study_file)
    with pytest.raises(StudyError, match=r"no training in .* has a checkpoint to retry from"):
        run_stages(study, tmp_path / "run", ("train",), retry_lr=1e-4)
    with pytest.raises(StudyError, match="--retry-lr: 0 is no learning rate"):
        run_stages(study, tmp_path / "run", ("train",), retry_lr=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_blow_up_is_retried_from_the_command_line(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ActivationStream.batch
    study = load_study(study_file, ["compute.checkpoint_every_min=0.000001", "saes=[{widths: [64]}]"])
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "batch", lambda self, n: batch(self, n) * (float("nan") if n == 9 else 1))
        with pytest.raises(StudyError, match=r"(?s)the loss is nan at batch 9; .*step 8 is kept.*--retry-lr 0.0005"):
            run_stages(study, tmp_path / "run", ("train",))
    retried = cli("train", tmp_path / "run" / "study.yaml", "--here", "--retry-lr", "0.0005")
    assert retried.returncode == 0, retried.stderr
    provenance = json.loads(next(tmp_path.glob("run/saes/*/provenance.json")).read_text())
    assert provenance["lr_changes"] == [{"step": 8, "lr": 0.0005}]
    assert "with learning rate 0.0005" in (tmp_path / "run" / "log.txt").read_text()
