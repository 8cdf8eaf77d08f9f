"""Sweeps on a real SLURM of one node, which `scripts/slurm_up.sh` brings up; with its 2 cores, under five minutes.

By itself SLURM keeps no accounts; `SAE_TRANSFER_SLURM_ACCOUNTING=1 scripts/test.sh -m slurm` runs all with sacct.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_transfer.sweep.states import Record, read_record
from tests.studies import cli, read_rows

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CHECKOUT = Path(__file__).parents[2]
PAIR = {"base": "demo:base", "chat": "demo:chat"}
LAUNCHER = {
    "engine": "slurm",
    "partition": "low",
    "gpus_per_job": 0,
    "cpus_per_job": 1,
    "mem_gb": 2,
    "timeout_min": 30,
    "array_parallelism": 2,
}

HAS_ACCOUNTS = os.environ.get("SAE_TRANSFER_SLURM_ACCOUNTING") == "1"

# Of the embedded text there are 726,503 tokens.
LONG = ("--set", "train.tokens=600k", "--set", "saes.widths=[65536]", "--set", "train.batch_size=256")


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM of our own for the tests of this module."""
    # SLURM's sockets need short paths
    home = Path("/tmp") / f"{tmp_path_factory.getbasetemp().name}-slurm"
    os.environ["SAE_TRANSFER_SLURM"] = str(home)
    up = subprocess.run([CHECKOUT / "scripts/slurm_up.sh"], capture_output=True, text=True, check=False)
    if up.returncode == 2:
        shutil.rmtree(home, ignore_errors=True)
        pytest.skip(f"no SLURM here: {up.stderr.strip().splitlines()[-1]}")
    assert up.returncode == 0, up.stderr
    before = {key: os.environ.get(key) for key in ("SLURM_CONF", "PYTHONPATH")}
    os.environ["SLURM_CONF"] = str(home / "slurm.conf")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), before["PYTHONPATH"])))
    yield
    subprocess.run([CHECKOUT / "scripts/slurm_down.sh"], check=False)
    for key, value in before.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value


def write_sweep(directory: Path, grid: dict[str, list[Any]], launcher: dict[str, Any] | None = None) -> Path:
    """A sweep over the embedded pair, cut to seconds a cell."""
    study = {
        "pair": PAIR,
        "site": {"layer": 2, "hook": "resid_pre"},
        "tokens": {"dataset": "demo:text", "context_size": 128},
        "saes": {"widths": [256], "l1_coefficient": [2]},
        "train": {"tokens": 40_960, "batch_size": 1024, "lr": 1e-3, "scale_tokens": 8192},
        "evaluate": {"tokens": 2048},
    }
    directory.mkdir(exist_ok=True)
    (directory / "study.yaml").write_text(yaml.safe_dump(study))
    path = directory / "sweep.yaml"
    sweep = {"study": "study.yaml", "grid": grid, "launcher": {**LAUNCHER, **(launcher or {})}}
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def submit(sweep: Path, *options: str) -> str:
    """Submit a sweep into `out` beside it, and give what the command said."""
    command = cli("sweep", sweep, "--out", sweep.parent / "out", *options)
    assert command.returncode == 0, command.stderr
    return command.stderr


def status(sweep: Path) -> dict[str, Any]:
    command = cli("status", sweep.parent / "out", "--json")
    assert command.returncode == 0, command.stderr
    return json.loads(command.stdout)


def records(sweep: Path) -> dict[str, Record]:
    """State of every job, by name."""
    jobs = json.loads((sweep.parent / "out" / "jobs.json").read_text())
    return {job["name"]: read_record(sweep.parent / "out", job["name"]) for job in jobs}


def of_kind(sweep: Path, kind: str) -> dict[str, Record]:
    return {name: record for name, record in records(sweep).items() if name.startswith(kind)}


def wait_until(true: Callable[[], bool], sweep: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, (records(sweep), queue("--states=all"))
        time.sleep(0.5)


def queue(*options: str) -> str:
    return subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True, check=True).stdout


def is_idle() -> bool:
    return not queue().strip()


def trains(sweep: Path, job: str) -> bool:
    log = sweep.parent / "out" / "jobs" / job / "log.txt"
    return records(sweep)[job].state == "running" and log.exists() and " tokens (" in log.read_text()


def test_a_sweep_survives_a_killed_and_a_preempted_job_and_goes_on_with_what_is_left(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"site.layer": [1, 2], "saes.widths": [[256], [512]]})
    said = submit(sweep, "--set", "train.tokens=200k")
    assert "9 jobs submitted" in said
    assert status(sweep)["counts"]["done"] == 0

    # One of the jobs is killed so that it cannot say so; another has to leave the node for a job of a higher partition.
    base, chat = (job for job in records(sweep) if job.startswith("train-") and "-layer1-" in job)
    wait_until(lambda: trains(sweep, base), sweep)
    number = records(sweep)[base].scheduler_id
    kill_with_parent(records(sweep)[base].pid)
    wait_until(lambda: number not in live_numbers(), sweep)
    assert records(sweep)[base].state == "running", "it could not say that it was killed"
    if HAS_ACCOUNTS:  # then only sacct knows it, once squeue has forgotten it
        wait_until(lambda: number not in queue("--array", "--states=all", "--format=%i").split(), sweep)
    assert next(cell for cell in status(sweep)["cells"] if "layer1" in cell["id"])["state"] == "killed"
    assert records(sweep)[base].state == "killed" and "SLURM says" in records(sweep)[base].message

    others = [job for job in records(sweep) if job.startswith("train-") and job != base]
    wait_until(lambda: any(trains(sweep, job) for job in others), sweep)
    preempted = next(job for job in others if trains(sweep, job))
    high = ["sbatch", "--partition=high", "--cpus-per-task=2", "--wrap=sleep 2", "--output=/dev/null"]
    subprocess.run(high, check=True)
    wait_until(lambda: "preempted" in records(sweep)[preempted].message, sweep)
    assert records(sweep)[preempted].state == "submitted"
    wait_until(is_idle, sweep)

    # What could finish has: all of the other layer, and the killed job's neighbour. No evaluation trained anything.
    found = status(sweep)
    assert found["counts"] == {**dict.fromkeys(found["counts"], 0), "done": 2, "killed": 2}
    assert (records(sweep)[preempted].state, records(sweep)[preempted].attempts) == ("done", 1)
    assert records(sweep)[chat].state == "done"
    assert {
        record.message.partition(":")[0] for name, record in of_kind(sweep, "evaluate").items() if "-layer1-" in name
    } == {"not started"}
    assert {record.state for record in of_kind(sweep, "train").values()} == {"done", "killed"}
    assert not list(sweep.parent.glob("out/cells/*layer1*/saes/base-*/sae_weights.safetensors"))
    finished = {name: record for name, record in records(sweep).items() if record.state == "done" and name != "report"}

    # The same command again submits what is left, and the report.
    assert "4 jobs submitted" in submit(sweep, "--set", "train.tokens=200k")
    wait_until(is_idle, sweep)
    assert status(sweep)["counts"]["done"] == 4
    assert {name: records(sweep)[name] for name in finished} == finished
    assert records(sweep)[base].attempts == 2
    for run in sweep.parent.glob("out/cells/*"):
        assert len(read_rows(run)) == 2 * 2 * 2
    assert (sweep.parent / "out" / "report" / "index.html").exists()
    assert "0 jobs submitted" in submit(sweep, "--set", "train.tokens=200k")


@pytest.mark.skipif(not HAS_ACCOUNTS, reason="beyond five minutes; SAE_TRANSFER_SLURM_ACCOUNTING=1 runs it as well")
def test_what_waits_in_the_queue_waits_for_the_new_attempt_of_what_it_needs(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"site.layer": [1]})
    longer = ("--set", "train.tokens=400k")
    assert "4 jobs submitted" in submit(sweep, *longer)
    (base,), (chat,), (evaluate,) = (of_kind(sweep, kind) for kind in ("train-base", "train-chat", "evaluate"))
    wait_until(lambda: trains(sweep, base), sweep)
    number = records(sweep)[base].scheduler_id
    kill_with_parent(records(sweep)[base].pid)
    wait_until(lambda: number not in live_numbers(), sweep)
    assert "3 jobs submitted, 1 live already" in submit(sweep, *longer)
    assert records(sweep)[chat].state == "running"
    assert (records(sweep)[evaluate].state, records(sweep)[evaluate].attempts) == ("submitted", 1)

    # As preemption begins where no other signal is configured: the job ends early, and SLURM would leave it at that.
    subprocess.run(["scancel", "--signal=TERM", str(records(sweep)[chat].scheduler_id)], check=True)
    wait_until(lambda: "preempted" in records(sweep)[chat].message, sweep)
    wait_until(is_idle, sweep)
    assert status(sweep)["counts"]["done"] == 1
    assert {name: record.attempts for name, record in records(sweep).items() if name != "report"} == {
        base: 2,
        chat: 1,
        evaluate: 1,
    }


def kill_with_parent(pid: int | None) -> None:
    """SIGKILL to a job's process and first to the one that watches it, as when a node dies."""
    (parent,) = re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    for each in (int(parent), pid or 0):
        os.kill(each, signal.SIGKILL)


def live_numbers() -> set[str]:
    return set(queue("--array", "--format=%i").split())


def test_what_fails_or_runs_out_of_time_stops_nothing_else_and_is_told_apart(tmp_path: Path) -> None:
    # One cell trains for half an hour with a limit of a minute, twice; of two others, which train together, one has an
    # infinite loss. SLURM looks every 30 s whose time is nearly up, so that its signal comes up to 30 s early: here at
    # the soonest 15 s after the start.
    endless = write_sweep(
        tmp_path / "endless",
        {"train.models": [["base"]]},
        {"timeout_min": 1, "signal_delay_s": 15, "max_timeouts": 1},
    )
    mixed = write_sweep(tmp_path / "mixed", {"saes.l1_coefficient": [[2], [1e38]], "train.models": [["base"]]})
    submit(endless, *LONG)
    submit(mixed)
    wait_until(is_idle, mixed)

    found = status(mixed)
    states = {cell["id"]: cell for cell in found["cells"]}
    good, bad = (next(cell for name, cell in states.items() if mark in name) for mark in ("coefficient2-", "e_38"))
    assert good["state"] == "done"
    assert bad["state"] == "failed" and bad["stage"] == "train-base" and bad["message"]
    assert not list((mixed.parent / "out" / "cells" / bad["id"]).glob("cross_eval/*"))
    assert records(mixed)["report"].state == "done"
    assert "0 jobs submitted" in submit(mixed)
    assert status(mixed)["counts"] == {**dict.fromkeys(found["counts"], 0), "done": 1, "failed": 1}

    (out_of_time,) = status(endless)["cells"]
    assert (out_of_time["state"], out_of_time["stage"]) == ("timeout", "train-base")
    (again,) = of_kind(endless, "train").values()
    assert again.attempts == 1
    log = endless.parent / "out" / "jobs" / "slurm" / f"{again.scheduler_id}_0_log.err"
    assert log.read_text().count("Caught signal SIGUSR2") == 2, "it went back into the queue once"

    # What ran out of time is tried again without being asked, here with more of it; a cancelled attempt does not count.
    write_sweep(endless.parent, {"train.models": [["base"]]})
    assert "3 jobs submitted" in submit(endless, *LONG)
    (job,) = of_kind(endless, "train")
    wait_until(lambda: trains(endless, job), endless)
    cancelled = cli("cancel", endless.parent / "out")
    assert cancelled.returncode == 0 and "3 jobs" in cancelled.stdout
    wait_until(is_idle, endless)
    assert status(endless)["counts"]["killed"] == 1
    assert of_kind(endless, "train")[job].attempts == 1
