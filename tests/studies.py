"""A small study over a random pair, as a file on disk, and how to run it as a user does."""

import csv
import multiprocessing
import os
import subprocess
import sys
import tempfile
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
        **sections,
    }
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in study.items() if value is not None}))
    return path


def read_rows(run: Path, name: str = "cross_eval/rows.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `sae-transfer` in a process of its own, forked from one that has imported what takes ten seconds."""
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as directory:
        output = [Path(directory) / name for name in ("stdout", "stderr")]
        process = IMPORTED.Process(target=_carry_out, args=(command, cwd or Path.cwd(), dict(os.environ), output))
        process.start()
        process.join()
        said = (path.read_text(encoding="utf-8") if path.exists() else "" for path in output)
        return subprocess.CompletedProcess(command, process.exitcode or 0, *said)


def cli_anew(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in a new Python, whose libraries read the environment as it is now."""
    command = [sys.executable, "-m", "sae_transfer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


IMPORTED = multiprocessing.get_context("forkserver")
IMPORTED.set_forkserver_preload(["sae_transfer.pipeline", "sae_transfer.report.page", "tests.studies"])


def _carry_out(command: list[str], cwd: Path, environment: dict[str, str], output: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in zip((1, 2), output, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["sae-transfer", *command]
    main()


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
