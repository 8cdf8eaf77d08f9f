"""A small study over a random pair, as a file on disk, and how to run it, or a script, as a user does."""

import csv
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sae_transfer.cli import main


def write_study(directory: Path, base: Path, chat: Path, text: Path, **sections: Any) -> Path:
    """A study that takes seconds; `sections` replace or add to it, None removes.

    Returns:
        The study file.
    """
    study: dict[str, Any] = {
        "pair": {"base": str(base), "chat": str(chat)},
        "site": {"layer": 1, "hook": "resid_pre"},
        "tokens": {"dataset": str(text), "context_size": 32},
        "saes": {"widths": [64], "l1_coefficient": [1]},
        "train": {"tokens": 4096, "batch_size": 64, "lr": 1e-3, "scale_tokens": 2048},
        "evaluate": {"tokens": 1024, "outlier_threshold": 8},
        "compute": {"device": "cpu"},
        **sections,
    }
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in study.items() if value is not None}))
    return path


def read_rows(run: Path, name: str = "cross_eval/rows.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


LONGEST_S = 600  # of a command in a test


class Started:
    """`sae-transfer`, or a script, in a process of its own, forked from one that has imported what takes long."""

    def __init__(self, *arguments: str | Path, cwd: Path | None = None, script: Path | None = None) -> None:
        """Start it."""
        self._command = [str(script or "sae-transfer"), *map(str, arguments)]
        self._said = tempfile.TemporaryDirectory()
        self._output = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        self._process = IMPORTED.Process(
            target=_carry_out, args=(self._command, script, cwd or Path.cwd(), dict(os.environ), self._output)
        )
        self._process.start()

    def send_signal(self, number: int) -> None:
        """Send the process a signal; none if it has ended."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait_for(self, true: Callable[[], bool]) -> None:
        """Wait until something is true, or the process has ended."""
        deadline = time.monotonic() + LONGEST_S
        while self._process.is_alive() and not true():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def says(self, text: str) -> bool:
        """Whether it has said something on stderr."""
        return text in self._output[1].read_text(encoding="utf-8") if self._output[1].exists() else False

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        self._process.join(LONGEST_S)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(f"{self._command}: no end within {LONGEST_S} s")
        said = [path.read_text(encoding="utf-8") if path.exists() else "" for path in self._output]
        self._said.cleanup()
        return subprocess.CompletedProcess(self._command, self._process.exitcode or 0, *said)


def cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `sae-transfer` to its end."""
    return Started(*arguments, cwd=cwd).end()


def run_script(path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python script to its end; what this package imports is imported already, and no `atexit` is called."""
    return Started(*arguments, script=path).end()


def cli_anew(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in a new Python, whose libraries read the environment as it is now."""
    command = [sys.executable, "-m", "sae_transfer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


IMPORTED = multiprocessing.get_context("forkserver")
IMPORTED.set_forkserver_preload(["sae_transfer.pipeline", "sae_transfer.report.page", "tests.studies"])


def _carry_out(
    command: list[str], script: Path | None, cwd: Path, environment: dict[str, str], output: list[Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in zip((1, 2), output, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    # a script that puts others in their place does not close what these write to
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = command
    if script is None:
        main()
    else:
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


def hold(run: Path, *parts: str) -> "subprocess.Popen[str]":
    """Start a process that has taken parts of a run directory and keeps them until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from sae_transfer.study import RunDirectory\n"
        "with RunDirectory.open(Path(sys.argv[1]), {}, sys.argv[2:]): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run), *parts], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process
