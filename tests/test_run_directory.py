"""A run directory that two processes use, or one after the other."""

import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_transfer import run_log, signals, study
from sae_transfer.errors import StudyError
from sae_transfer.study import PATIENCE_VARIABLE, RunDirectory
from tests.disks import fill
from tests.studies import hold

logger = logging.getLogger("sae_transfer")

NAMED = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]


def fail(root: Path, error: BaseException, before: Callable[[], object] = lambda: None) -> None:
    """A run that an exception ends."""
    with RunDirectory.open(root, {}):
        logger.info("begun")
        before()
        raise error


def test_who_is_told_to_be_patient_waits_for_the_process_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "60")
    holder = hold(tmp_path / "run", "base", "chat")
    killed = threading.Event()
    threading.Timer(1, lambda: (killed.set(), holder.kill())).start()
    with RunDirectory.open(tmp_path / "run", {}):
        assert killed.is_set()
    holder.wait()


def test_patience_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.2")
    holder = hold(tmp_path / "run", "base")
    with (
        pytest.raises(StudyError, match="another sae-transfer process"),
        RunDirectory.open(tmp_path / "run", {}, ("base",)),
    ):
        pass
    holder.kill()
    holder.wait()


def test_two_writers_of_one_log_begin_a_new_file_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_BYTES", 1000)
    lines = [f"line {index} {'x' * 80}" for index in range(100)]
    with RunDirectory.open(tmp_path, {}, ("base",)):
        base = logger.handlers[-1]
        with RunDirectory.open(tmp_path, {}, ("chat",)):
            chat = logger.handlers[-1]
            for index, line in enumerate(lines):
                # as in two processes, each line is of one of them
                (base, chat)[index % 3 == 0].handle(logging.LogRecord("a", logging.INFO, "", 1, line, None, None))
    files = sorted(tmp_path.glob("log.txt*"))
    assert [file.name for file in files] == ["log.txt", "log.txt.1"]
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = [line.split("INFO ")[1] for file in reversed(files) for line in file.read_text().splitlines()]
    assert kept == lines[-len(kept) :] and len(kept) > 7, "the newest lines, in order, none missing"


@pytest.mark.parametrize(
    ("error", "said", "has_traceback"),
    [
        (StudyError("no such layer", "lower site.layer"), "no such layer\n  try: lower site.layer\n", False),
        (signals.Stopped(signal.SIGTERM), "stopped by SIGTERM\n", False),
        (KeyboardInterrupt(), "KeyboardInterrupt\n", False),
        (StudyError("caf\udce9: no such file"), "caf\\udce9: no such file\n", False),  # a name that is not UTF-8
        (ZeroDivisionError("of https://me:hush@example.org"), "ZeroDivisionError: of https://example.org\n", True),
    ],
)
def test_the_log_ends_with_what_ended_the_run(
    error: BaseException, said: str, has_traceback: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path, error)
    end = (tmp_path / "log.txt").read_text().partition("begun\n")[2]
    assert end.endswith(said) and end.count(" ERROR ") == 1 and ("Traceback" in end) is has_traceback
    assert "ERROR" not in caplog.text, "the terminal is told by who gets the error"


def test_a_log_without_room_leaves_a_run_its_own_error(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fill_the_disk() -> None:
        fill(small_disk)
        logger.info("x" * 10_000)

    with pytest.raises(StudyError, match="the first reason"):
        fail(small_disk / "run", StudyError("the first reason"), fill_the_disk)
    assert "begun" in (small_disk / "run" / "log.txt").read_text()
    assert capfd.readouterr().err == ""


def test_a_run_directory_that_was_moved_leaves_a_run_its_own_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def move() -> None:
        (tmp_path / "run").rename(tmp_path / "moved")
        logger.info("one")
        logger.info("two")

    with pytest.raises(StudyError, match="the first reason"):
        fail(tmp_path / "run", StudyError("the first reason"), move)
    assert capfd.readouterr().err == ""


def test_a_log_goes_on_where_another_process_began_a_new_one_on_a_full_disk(small_disk: Path) -> None:
    log = small_disk / "run" / "log.txt"
    with RunDirectory.open(small_disk / "run", {}):
        filler = fill(small_disk)
        logger.info("x" * 3_000)
        logger.info("x" * 3_000)
        log.replace(log.with_name("log.txt.1"))
        logger.info("lost")
        filler.unlink()
        logger.info("there is room again")
    assert log.read_text().endswith("there is room again\n")


def test_the_checkout_that_a_manifest_names_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "study.py").write_text("")
    for command in (["init"], ["add", "."], [*NAMED, "commit", "--message", "first"]):
        subprocess.run(["git", "-C", package, *command], check=True, capture_output=True)
    os.utime(package / "study.py", (1, 1))  # so that `git status` would refresh the index
    index = (package / ".git" / "index").read_bytes()
    monkeypatch.setattr(study, "__file__", str(package / "study.py"))
    with RunDirectory.open(tmp_path / "run", {}) as run:
        run.update_manifest()
    git = json.loads((tmp_path / "run" / "manifest.json").read_text())["git"]
    assert len(git["commit"]) == 40 and git["dirty"] is False
    assert (package / ".git" / "index").read_bytes() == index
