"""Exact restart: cut and resumed equals uncut bit for bit, and what could make it differ is refused or passed over."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_transfer import signals
from sae_transfer.errors import StudyError
from tests.disks import fill
from tests.saes.saes import ARCHITECTURES
from tests.saes.trainings import ALWAYS, NEVER, Cut, GivenStream, files_of, steps_of, train, trainee

WARMUP = {"warmup": 0.1}  # lr rises over 6 of the 60 steps and falls over the last 12


def cut(directory: Path, architecture: str, at: int) -> None:
    """End as after SIGKILL, with a checkpoint at this step and the one before."""
    steps = [at - 1, at]
    with pytest.raises(Cut):
        train([trainee(directory, architecture, warmup=9)], GivenStream(cut_at=at), every_min=ALWAYS, **WARMUP)
    assert steps_of(directory) == steps


def stop(directory: Path, architecture: str, at: int, number: int = signal.SIGTERM) -> None:
    """End by a signal, with a checkpoint at this step."""
    stream = GivenStream(before=lambda n: os.kill(os.getpid(), number) if n == at else None)
    with signals.installed(), pytest.raises(signals.Stopped):
        train([trainee(directory, architecture, warmup=9)], stream, **WARMUP)
    assert steps_of(directory)[-1] == at


def resume(directory: Path, architecture: str) -> None:
    train([trainee(directory, architecture, warmup=9)], GivenStream(), **WARMUP)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each architecture, trained without a cut; and in `state`, the only checkpoint of such trainings."""
    root = tmp_path_factory.mktemp("uncut")
    for architecture in ARCHITECTURES:
        resume(root / architecture, architecture)
        stop(root / "state" / architecture, architecture, 59)
    return {architecture: root / architecture for architecture in (*ARCHITECTURES, "state")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cut_and_resumed_equals_uncut_bit_for_bit(architecture: str, uncut: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / architecture
    for at in (3, 25, 26, 53):  # while lr and coefficient rise, twice in between, while lr falls
        stop(directory, architecture, at)
    stop(directory, architecture, 59)
    states = [path / "checkpoints" / "59" for path in (directory, uncut["state"] / architecture)]
    weights = [(path / "weights.safetensors").read_bytes() for path in states]
    assert weights[0] == weights[1]
    trainers = [torch.load(path / "trainer_state.pt", weights_only=True) for path in states]
    assert flat(trainers[0]) == flat(trainers[1])
    resume(directory, architecture)
    assert files_of(directory) == files_of(uncut[architecture])


def flat(state: object) -> object:
    """Nested state with every tensor as its bytes."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [flat(value) for value in state]
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_every_signal_saves_between_two_steps(number: int, uncut: dict[str, Path], tmp_path: Path) -> None:
    stop(tmp_path / "topk", "topk", 31, number)
    resume(tmp_path / "topk", "topk")
    assert files_of(tmp_path / "topk") == files_of(uncut["topk"])


def test_the_last_two_are_kept_and_none_of_a_stored_sae(tmp_path: Path) -> None:
    cut(tmp_path / "sae", "standard", 30)
    resume(tmp_path / "sae", "standard")
    assert sorted(files_of(tmp_path / "sae")) == [
        "cfg.json",
        "provenance.json",
        "sae_weights.safetensors",
        "train_log.jsonl",
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["weights.safetensors", "trainer_state.pt", "checkpoint.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    name: str, damage: str, uncut: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    directory = tmp_path / "topk"
    cut(directory, "topk", 6)
    path = directory / "checkpoints" / "6" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    resume(directory, "topk")
    assert f"{directory / 'checkpoints' / '6'} is damaged ({name}) and passed over" in caplog.text
    assert "going on from the checkpoint of step 5" in caplog.text
    assert files_of(directory) == files_of(uncut["topk"])


def test_a_checkpoint_of_another_training_is_refused_and_left_alone(tmp_path: Path) -> None:
    stop(tmp_path / "sae", "topk", 30)
    before = files_of(tmp_path / "sae")
    other = trainee(tmp_path / "sae", "topk", warmup=9, **{"token set": 2, "dtype": "bfloat16"})
    with pytest.raises(
        StudyError, match=r"(?s)checkpoints/30: belongs to another .*: dtype, token set\n.*--force .*--out"
    ):
        train([other], GivenStream(), **WARMUP)
    assert files_of(tmp_path / "sae") == before
    train([other], GivenStream(), force=True, **WARMUP)
    with pytest.raises(StudyError, match="sae: belongs to another training; other than here: dtype, token set"):
        resume(tmp_path / "sae", "topk")


def test_a_stored_sae_is_not_trained_again(tmp_path: Path, uncut: dict[str, Path]) -> None:
    shutil.copytree(uncut["topk"], tmp_path / "topk")
    seen: list[int] = []
    train([trainee(tmp_path / "topk", "topk", warmup=9)], GivenStream(before=seen.append), **WARMUP)
    assert not seen and files_of(tmp_path / "topk") == files_of(uncut["topk"])


def test_siblings_go_on_together_from_the_newest_step_that_both_have(uncut: dict[str, Path], tmp_path: Path) -> None:
    pair = ("standard", "topk")
    with pytest.raises(Cut):
        train([trainee(tmp_path / a, a, warmup=9) for a in pair], GivenStream(cut_at=6), every_min=ALWAYS, **WARMUP)
    shutil.rmtree(tmp_path / "topk" / "checkpoints" / "6")  # killed after the first of the two had saved
    seen: list[int] = []
    train([trainee(tmp_path / a, a, warmup=9) for a in pair], GivenStream(before=seen.append), **WARMUP)
    assert seen == list(range(5, 60))
    assert all(files_of(tmp_path / a) == files_of(uncut[a]) for a in pair)


def test_siblings_without_a_step_in_common_go_on_one_after_the_other(uncut: dict[str, Path], tmp_path: Path) -> None:
    stop(tmp_path / "standard", "standard", 20)
    stop(tmp_path / "topk", "topk", 40)
    seen: list[int] = []
    three = [trainee(tmp_path / a, a, warmup=9) for a in ("standard", "topk", "gated")]
    train(three, GivenStream(before=seen.append), **WARMUP)
    assert seen == [*range(60), *range(20, 60), *range(40, 60)]
    assert all(files_of(tmp_path / a) == files_of(uncut[a]) for a in ("standard", "topk", "gated"))


def test_what_a_killed_process_left_half_written_is_cleared(uncut: dict[str, Path], tmp_path: Path) -> None:
    stop(tmp_path / "topk", "topk", 30)
    for scratch in ("checkpoints/.31.abcd1234", ".sae_weights.safetensors.abcd1234"):
        (tmp_path / "topk" / scratch).mkdir()
        (tmp_path / "topk" / scratch / "weights.safetensors").write_bytes(b"half")
    with (tmp_path / "topk" / "train_log.jsonl").open("a") as log:
        log.write('{"step": 31, "tok')
    resume(tmp_path / "topk", "topk")
    assert files_of(tmp_path / "topk") == files_of(uncut["topk"])


def test_every_entry_of_the_curve_is_told_once_over_all_processes(tmp_path: Path) -> None:
    told: list[int] = []

    def part(stream: GivenStream, every_min: float = NEVER) -> None:
        told_of = replace(trainee(tmp_path / "sae", "topk"), on_log=lambda _, entry: told.append(entry["step"]))
        train([told_of], stream, every_min=every_min)

    for at, every_min in ((10, ALWAYS), (40, NEVER), (25, NEVER), (45, NEVER)):  # only the first leaves a checkpoint
        with pytest.raises(Cut):
            part(GivenStream(cut_at=at), every_min)
    part(GivenStream())
    assert told == list(range(1, 61))


def test_a_full_disk_ends_no_training(
    uncut: dict[str, Path], small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def fill_and_empty(n: int) -> None:
        if n == 20:
            fill(small_disk)
        if n == 40:
            (small_disk / "filler").unlink()
        if n in (30, 50):
            kept.append(steps_of(small_disk / "topk"))

    kept: list[list[int]] = []
    train(
        [trainee(small_disk / "topk", "topk", warmup=9)], GivenStream(before=fill_and_empty), every_min=ALWAYS, **WARMUP
    )
    assert kept == [[19, 20], [49, 50]]
    assert "no checkpoint at step 30, the newest is that of step 20" in caplog.text
    assert "No space left on device" in caplog.text and "check free space" in caplog.text
    assert files_of(small_disk / "topk") == files_of(uncut["topk"])


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """Files of at most 6 kB: weights fit in none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_stop_that_cannot_save_says_which_checkpoint_is_left(
    tmp_path: Path, file_size_limit: None, caplog: pytest.LogCaptureFixture
) -> None:
    stream = GivenStream(before=lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 31 else None)
    with signals.installed(), pytest.raises(signals.Stopped):
        train([trainee(tmp_path / "sae", "topk")], stream)
    assert "no checkpoint at step 31, there is none yet" in caplog.text and "File too large" in caplog.text
    assert steps_of(tmp_path / "sae") == [] and not list((tmp_path / "sae").glob("checkpoints/*"))


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path) -> None:
    sae = trainee(tmp_path / "sae", "topk")

    def spoil(n: int) -> None:
        if n == 20:
            with torch.no_grad():
                sae.sae.get_parameter("b_enc")[0] = float("nan")
            os.kill(os.getpid(), signal.SIGTERM)

    with signals.installed(), pytest.raises(signals.Stopped):
        train([sae], GivenStream(before=spoil))
    assert steps_of(tmp_path / "sae") == []
