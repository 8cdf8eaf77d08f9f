"""Studies trained on one stream, and both models of one study at once, give what each gives alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_transfer.errors import StudyError
from sae_transfer.models.splice import LayerSplicer
from sae_transfer.pipeline import run_stages, train_together
from sae_transfer.saes.store import WEIGHTS_FILE
from sae_transfer.stages.context import Context
from sae_transfer.study_file import load_study
from tests.studies import Started, cli, hold, write_study

FINETUNE = {"tokens": [2048], "batch_size": 64}


@pytest.fixture
def write(tmp_path: Path, llama_pair: tuple[Path, Path], text_file: Path) -> Callable[..., Path]:
    """Writes a study into a directory of its own, its run directory."""

    def write_at(name: str, width: int, **sections: object) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        saes = {"widths": [width], "l1_coefficient": [1]}
        made = write_study(directory, *llama_pair, text_file, saes=saes, finetune=FINETUNE, **sections)
        return made.rename(directory / "study.yaml")

    return write_at


def weights_of(run: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(run.glob(f"saes/*/{WEIGHTS_FILE}"))}


def test_studies_trained_on_one_stream_get_the_weights_of_each_alone(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {tmp_path / name: write(name, width) for name, width in (("a", 64), ("b", 48))}
    studies = {run: load_study(file) for run, file in files.items()}
    for run, study in studies.items():
        run_stages(study, run.with_name(f"{run.name}-alone"), ("train", "finetune"))
    sequences_run = []
    run_to = LayerSplicer.run_to
    monkeypatch.setattr(LayerSplicer, "run_to", lambda self, x: sequences_run.append(len(x)) or run_to(self, x))
    train_together(studies, "train")
    alone = len(sequences_run)
    train_together({next(iter(studies)): studies[next(iter(studies))]}, "train", force=True)
    assert len(sequences_run) - alone == alone - 2 * 2, "two studies cost the passes of one, and its norm scales"
    train_together(studies, "finetune")
    for run in studies:
        assert weights_of(run) == weights_of(run.with_name(f"{run.name}-alone"))
        assert len(weights_of(run)) == 3
        assert {path.name for path in (run / "stages").iterdir()} >= {"train-base.json", "finetune.json"}


def test_studies_that_cannot_share_a_stream_are_refused_by_what_differs(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write("a", 64)
    write("b", 48, train={"tokens": 4096, "batch_size": 32, "scale_tokens": 2048})
    done = cli("train", tmp_path / "a" / "study.yaml", tmp_path / "b" / "study.yaml", "--here")
    assert done.returncode == 2
    assert "cannot be trained on one stream; they differ in batch_size, batches, schedule" in done.stderr.replace(
        "\n", " "
    )


def test_several_study_files_need_here(write: Callable[..., Path], tmp_path: Path) -> None:
    done = cli("train", write("a", 64), write("b", 48))
    assert done.returncode == 2
    assert "add --here" in done.stderr


def test_base_and_chat_are_trained_by_two_processes_at_once(write: Callable[..., Path], tmp_path: Path) -> None:
    run, study = tmp_path / "a", write("a", 64)
    run_stages(load_study(study), tmp_path / "alone", ("train",))
    both = [Started("train", study, "--here", "--model", side) for side in ("base", "chat")]
    ended = [process.end() for process in both]
    errors = [process.stderr for process in ended]
    assert [process.returncode for process in ended] == [0, 0], errors
    assert weights_of(run) == weights_of(tmp_path / "alone")
    assert sum("tokens: done in" in error for error in errors) == 1, "the second process waits for the first's tokens"


def test_a_process_that_trains_one_model_keeps_out_all_but_the_other(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    study = load_study(write("a", 64))
    holder = hold(tmp_path / "a", "base")
    try:
        with pytest.raises(StudyError, match="another sae-transfer process"):
            run_stages(study, tmp_path / "a", ("train",))
        with pytest.raises(StudyError, match="another sae-transfer process"):
            train_together({tmp_path / "a": study}, "train", side="base")
        train_together({tmp_path / "a": study}, "train", side="chat")
    finally:
        holder.kill()
        holder.wait()


def test_two_devices_train_both_models_at_once_with_equal_weights(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(write("a", 64))
    run_stages(study, tmp_path / "alone", ("train",))
    monkeypatch.setattr(Context, "devices", lambda self, n: ["cpu"] * n)
    run_stages(study, tmp_path / "a", ("train",))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "alone")


def test_a_moved_run_directory_goes_on_from_its_own_study_file(write: Callable[..., Path], tmp_path: Path) -> None:
    write("a", 64)
    assert cli("train", tmp_path / "a" / "study.yaml", "--here").returncode == 0
    moved = shutil.move(tmp_path / "a", tmp_path / "moved")
    done = cli("train", Path(moved) / "study.yaml", "--here")
    assert done.returncode == 0
    assert done.stderr.count("done already") == 2
