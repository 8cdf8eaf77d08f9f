"""Sweeps on this machine, with real jobs: processes of `sae-transfer`, seconds each."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from sae_transfer import signals
from sae_transfer.cost.device import find_device
from sae_transfer.errors import StudyError
from sae_transfer.sweep import local
from sae_transfer.sweep.cells import expand, freeze, read_cells
from sae_transfer.sweep.file import load_sweep
from sae_transfer.sweep.jobs import Job, plan_jobs, read_jobs, write_jobs
from sae_transfer.sweep.run import cancel_sweep, describe, read_status, submit_sweep, wait
from sae_transfer.sweep.states import Fact, Record, read_record, submitted, update_record
from tests.asking import Dying, ask
from tests.disks import full
from tests.studies import Started, cli, hold, read_rows
from tests.sweep.sweeps import CPU, write_sweep

Pair = tuple[Path, Path]
BASE_ONLY = {"tokens": 4096, "batch_size": 64, "lr": 1e-3, "scale_tokens": 2048, "models": ["base"]}
ENDLESS = {**BASE_ONLY, "tokens": "1B"}


def records(directory: Path) -> dict[str, Record]:
    """State of every job, by kind: of these sweeps no kind has two that are looked at."""
    jobs = json.loads((directory / "jobs.json").read_text())
    return {job["kind"]: read_record(directory, job["name"]) for job in jobs}


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/status").read_text().find("State:\tZ") < 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_sweep_runs_to_its_report_and_is_done_then(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32], [64]]}, train=BASE_ONLY)
    out = tmp_path / "out"

    # An earlier attempt at one of the cells is still ending; its job waits for that.
    earlier = hold(out / "cells" / expand(load_sweep(sweep))[0].id, "base", "chat")
    (out / local.SWEEP_LOCK).touch()  # as the sweep command that submitted it left
    logs = out / "jobs"
    try:
        sweeping = Started("sweep", sweep, "--out", out, "--wait", "--slots", "2")
        sweeping.wait_for(lambda: any("in use; waiting" in log.read_text() for log in logs.glob("train-base*/log.txt")))
    finally:
        earlier.kill()
        earlier.wait()
    done = sweeping.end()
    assert done.returncode == 0, done.stderr
    (log,) = logs.glob("train-base*/log.txt")
    assert "in use; waiting" in log.read_text()
    assert str(out / "report" / "index.html") in done.stdout
    shown = json.loads(cli("status", out, "--json").stdout)
    assert shown["counts"] == {**dict.fromkeys(shown["counts"], 0), "done": 2}
    watched = cli("status", out, "--watch")
    assert watched.returncode == 0 and "2 done" in watched.stdout
    assert list(shown["counts"]) == "pending submitted running done failed killed timeout lost".split()
    assert {*shown["cells"][0]} == {"id", "state", "stage", "job", "message"}
    assert len(read_rows(out / "report", "rows.csv")) == sum(len(read_rows(cell)) for cell in out.glob("cells/*")) > 0
    assert len(list(out.glob("cells/*/saes/base-*/sae_weights.safetensors"))) == 2
    assert submit_sweep(sweep, out) == 0

    # The combined report is made also where it cannot be said what became of a job.
    (out / "jobs" / "report" / "state.json").write_text('{"state": ')
    again = cli("report", out)
    assert again.returncode == 0 and "is not known" in again.stderr


@pytest.mark.slow
def test_jobs_end_with_their_supervisor_and_go_on_when_asked(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32]]}, train=ENDLESS)
    out = tmp_path / "out"
    submitted = cli("sweep", sweep, "--out", out)
    assert submitted.returncode == 0 and f"status {out}" in submitted.stdout
    wait_until(lambda: records(out)["train-base"].state == "running")
    assert local.is_supervised(out), "it outlives the command"
    assert cli("sweep", sweep, "--out", out).stderr.startswith("0 jobs submitted, 3 live already")

    # A supervisor that is killed takes its jobs with it, and what it leaves is told for what it is.
    pid = records(out)["train-base"].pid
    os.kill(int((out / "jobs" / "supervisor.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    (cell,) = read_status(out).cells
    assert (cell.state, cell.stage) == ("killed", "train-base")
    assert records(out)["evaluate"].state == records(out)["report"].state == "pending"

    # The same command submits it again; cancelled, nothing runs any more.
    assert submit_sweep(sweep, out) == 3
    wait_until(lambda: records(out)["train-base"].state == "running")
    pid = records(out)["train-base"].pid
    assert cancel_sweep(out) == 3
    assert not local.is_supervised(out) and not is_alive(pid)
    assert read_status(out).counts["killed"] == 1
    assert records(out)["train-base"].attempts == 1, "an attempt that its user ended does not count"


def test_a_job_that_fails_keeps_what_needs_it_from_starting(llama_pair: Pair, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"other": "column"}\n')
    sweep = write_sweep(tmp_path, llama_pair, text, {"saes.widths": [[32]]}, train=BASE_ONLY)
    out = tmp_path / "out"
    done = cli("sweep", sweep, "--out", out, "--wait")
    assert done.returncode == 2, done.stderr
    assert "1 of 1 cells are not done" in done.stderr
    (cell,) = read_status(out).cells
    assert (cell.state, cell.stage) == ("failed", "train-base")
    assert "column" in cell.message and "\n  try: " in cell.message
    assert records(out)["evaluate"].message.startswith("not started: train-base")
    assert records(out)["report"].state == "done"
    assert "column" in (out / "report" / "index.html").read_text()
    (missing,) = read_rows(out / "report" / "tables", "missing.csv")
    assert missing["State"] == "failed" and missing["Message"].startswith(cell.message.partition("\n")[0])
    again = cli("sweep", sweep, "--out", out)
    assert "--retry-failed" in again.stderr and "0 jobs submitted" in again.stderr
    text.write_text('{"text": "the cat sat on the mat and saw ships"}\n' * 2000)
    assert submit_sweep(sweep, out, retry_failed=True, foreground=True) == 3
    assert records(out)["train-base"].attempts == 2
    assert read_status(out).counts["done"] == 1


def test_what_a_full_disk_holds_up_is_tried_again_and_said_once(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = Job("report", "report", ("a-cell-that-was-never-written",), (), ())
    write_jobs([report], small_disk)
    update_record(small_disk, "report", lambda record: submitted(record, report, "local"))
    (small_disk / "jobs" / "slots").write_text("1")
    lock = local.claim(small_disk)
    assert lock is not None

    def be_full_for_a_while() -> None:
        wait_until((small_disk / "jobs" / "supervisor.pid").exists)
        with full(small_disk):
            wait_until(lambda: "tried again" in caplog.text)
            time.sleep(3 * local.POLL_S)

    disk = threading.Thread(target=be_full_for_a_while)
    disk.start()
    local.supervise(small_disk, lock)
    disk.join()
    assert read_record(small_disk, "report").state == "failed"
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert said.startswith("report: tried again until it succeeds: ") and "No space left" in said


def test_a_supervisor_heeds_a_signal_that_was_lost_before_it(tmp_path: Path) -> None:
    lock = local.claim(tmp_path)
    assert lock is not None
    with signals.installed():
        Dying()
        with pytest.raises(signals.Stopped):
            local.supervise(tmp_path, lock)
    assert not lock.is_locked


def test_a_signal_interrupts_a_supervisor_neither_while_it_starts_jobs_nor_while_it_stops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = local.claim(tmp_path)
    assert lock is not None
    (tmp_path / "jobs" / "slots").write_text("1")
    done = []
    monkeypatch.setattr(local, "_fill", lambda *_: ask(signal.SIGTERM) or done.append("started") or True)
    monkeypatch.setattr(local, "_stop", lambda _: ask(signal.SIGUSR2) or done.append("stopped"))
    with signals.installed(), pytest.raises(signals.Stopped, match="SIGTERM"):
        local.supervise(tmp_path, lock)
    assert done == ["started", "stopped"]
    assert not lock.is_locked and not list(tmp_path.glob("jobs/*.pid"))


def test_a_supervisor_that_does_not_start_is_said(
    llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StudyError, match=r"ended at once, with exit code 1\n  try: read .*supervisor.log"):
        submit_sweep(sweep, tmp_path / "out")
    assert {record.state for record in records(tmp_path / "out").values()} == {"pending"}


@pytest.mark.parametrize("is_interrupted", [False, True])  # Ctrl-C ends sbatch as well, which is no refusal
def test_slurm_where_there_is_none_is_refused_and_nothing_is_submitted(
    is_interrupted: bool, llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = write_sweep(tmp_path, llama_pair, text_file, launcher={"engine": "slurm"})
    error, said = (signals.Stopped, "SIGTERM") if is_interrupted else (StudyError, r"SLURM refuses train-base-.*srun")
    with signals.installed():
        if is_interrupted:
            Dying()
        with pytest.raises(error, match=said):
            submit_sweep(sweep, tmp_path / "out")
    assert {record.state for record in records(tmp_path / "out").values()} == {"pending"}


def test_a_sweep_that_lacks_cells_it_had_is_refused_before_it_is_described(
    llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(local, "supervise", lambda _, lock: lock.release())
    submit_sweep(write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32], [64]]}), out, foreground=True)
    fewer = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32]]})
    with pytest.raises(StudyError, match="holds cells that are not"):
        list(describe(fewer, out, (), find_device("h100"), gpu=True))


def test_smaller_jobs_take_over_what_is_known_of_the_larger_one(
    llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "supervise", lambda _, lock: lock.release())
    out, grid = tmp_path / "out", {"saes.widths": [[32], [64]]}
    assert submit_sweep(write_sweep(tmp_path, llama_pair, text_file, grid, train=BASE_ONLY), out, foreground=True) == 4
    for job in read_jobs(out):
        known = Record("failed", job.cells, 3, "local", message="blew up") if job.kind == "train-base" else Record()
        update_record(out, job.name, lambda _, known=known: known)
    smaller = write_sweep(tmp_path, llama_pair, text_file, grid, {**CPU, "cells_per_job": 1}, train=BASE_ONLY)
    shown = list(describe(smaller, out, (), find_device("h100"), gpu=True))
    assert sum("train-base" in line and "1 cell, " in line and "failed already" in line for line in shown) == 2
    assert submit_sweep(smaller, out, foreground=True) == 1, "the report; what failed is held back as before"
    trainings = [read_record(out, job.name) for job in read_jobs(out) if job.kind == "train-base"]
    assert [(record.state, record.attempts, len(record.cells)) for record in trainings] == 2 * [("failed", 3, 1)]
    assert {cell.message for cell in read_status(out).cells} == {"blew up"}
    assert submit_sweep(smaller, out, retry_failed=True, foreground=True) == 5


def test_waiting_for_a_local_sweep_in_which_nothing_was_left_to_submit(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32]]})
    out = tmp_path / "out"
    cells = expand(load_sweep(sweep))
    jobs = plan_jobs(cells)
    (out / local.SWEEP_LOCK).parent.mkdir(parents=True)
    (out / local.SWEEP_LOCK).touch()
    freeze(cells, out)
    write_jobs(jobs, out)
    for job in jobs:  # as another engine left it
        state = "done" if job.kind == "report" else "failed"
        update_record(out, job.name, lambda _, job=job, state=state: Record(state, job.cells, 1, "slurm"))
    assert submit_sweep(sweep, out) == 0
    assert wait(out).counts["failed"] == 1


def test_the_status_of_a_sweep_that_may_not_be_written_is_what_its_files_say(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job("train-base-x", "train-base", ("x",), (), ("train-base",))
    report = Job("report", "report", ("x",), (), ())
    write_jobs([job, report], small_disk)
    (small_disk / "cells.json").write_text('[{"id": "x", "study": "x", "settings": {}}]')
    (small_disk / "sweep.yaml").write_text("")
    update_record(small_disk, job.name, lambda record: replace(submitted(record, job, "local"), state="running"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert [cell.state for cell in read_status(small_disk).cells] == ["running"]
    assert "cannot be written" in caplog.text
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert [cell.state for cell in read_status(small_disk).cells] == ["killed"]


def test_two_sweep_commands_on_one_directory_do_not_meet(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file)
    out = tmp_path / "out"
    (out / "jobs").mkdir(parents=True)
    with FileLock(out / local.SWEEP_LOCK), pytest.raises(StudyError, match="another sweep command"):
        submit_sweep(sweep, out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(StudyError, match="not a sweep's directory"):
        submit_sweep(sweep, other)
    for verb in ("status", "cancel"):
        refused = cli(verb, other)
        assert refused.returncode == 2 and "is no sweep's directory" in refused.stderr


def test_what_a_job_wrote_while_its_engine_was_asked_is_believed(
    llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32]]})
    out = tmp_path / "out"
    monkeypatch.setattr(local, "supervise", lambda _, lock: lock.release())
    submit_sweep(sweep, out, foreground=True)
    name = next(job["name"] for job in json.loads((out / "jobs.json").read_text()) if job["kind"] == "evaluate")
    asked = local.facts

    def ask_slowly(directory: Path, live: Mapping[str, Record]) -> dict[str, Fact]:
        facts = asked(directory, live)
        update_record(directory, name, lambda record: replace(record, state="done"))
        return facts

    monkeypatch.setattr(local, "facts", ask_slowly)
    read_status(out)
    states = {kind: record.state for kind, record in records(out).items()}
    assert states == {"train-base": "pending", "train-chat": "pending", "evaluate": "done", "report": "pending"}


@pytest.mark.parametrize("foreground", [True, False])
def test_jobs_are_marked_only_once_they_are_supervised(
    foreground: bool, llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32]]}, train=ENDLESS)
    out = tmp_path / "out"
    mark, seen = local.submit, []

    def mark_and_look(directory: Path, jobs: Sequence[Job]) -> None:
        mark(directory, jobs)
        seen.append(read_status(directory).counts["pending"])

    monkeypatch.setattr(local, "submit", mark_and_look)
    monkeypatch.setattr(local, "supervise", lambda _, lock: lock.release())
    submit_sweep(sweep, out, foreground=foreground)
    local.cancel(out)
    assert seen == [0], "who looks meanwhile takes nothing back"
    assert not (out / "jobs" / "supervisor.pid").exists()


def test_a_number_that_is_another_process_now_is_not_sent_a_signal(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "jobs" / "supervisor.pid").write_text(str(other.pid))
        lock = local.claim(tmp_path)
        assert lock is not None
        with pytest.raises(StudyError, match="not on this machine"):
            local.cancel(tmp_path)
        lock.release()
        local.cancel(tmp_path)
        assert other.poll() is None
        other.kill()


def test_a_dry_run_lists_jobs_and_costs_and_writes_nothing(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file)
    lines = list(describe(sweep, tmp_path / "out", (), find_device("cpu"), gpu=False))
    assert lines[0].startswith("4 cells, 9 jobs, engine local")
    jobs = [line for line in lines if line.startswith("job ")]
    assert len(jobs) == 9 and sum("2 cells, " in line for line in jobs) == 4
    assert all("GiB on the device, about" in line for line in jobs[:-1])
    assert not (tmp_path / "out").exists()


def test_slots_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.count_gpus() == 0
    assert local.slot_environment(1, 2) == {"OMP_NUM_THREADS": "4"}
    assert local.slot_environment(0, 16) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local.count_gpus() == 2
    assert [local.slot_environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "5", "3"]


def test_jobs_that_cannot_be_cancelled_stay_as_they_are(
    llama_pair: Pair, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path, llama_pair, text_file, {"saes.widths": [[32]]})
    out = tmp_path / "out"
    monkeypatch.setattr(local, "supervise", lambda _, lock: lock.release())
    submit_sweep(sweep, out, foreground=True)

    def refuse(_: Path) -> None:
        raise StudyError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(local, "cancel", refuse)
        lock = local.claim(out)
        assert lock is not None
        with pytest.raises(StudyError, match="no answer"):
            cancel_sweep(out)
        assert {record.state for record in records(out).values()} == {"submitted"}
        lock.release()


def test_a_directory_with_a_file_of_the_sweeps_name_is_no_sweep(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    sweep = write_sweep(tmp_path / "own", llama_pair, text_file)
    before = sweep.read_text()
    with pytest.raises(StudyError, match="is no sweep's directory"):
        read_status(sweep.parent)
    (sweep.parent / local.SWEEP_LOCK).touch()
    with pytest.raises(StudyError, match="would be overwritten"):
        submit_sweep(sweep, sweep.parent)
    assert sweep.read_text() == before


@pytest.mark.parametrize("name", ["jobs.json", "cells.json"])
@pytest.mark.parametrize("content", ["[", "[1]", '{"a": 1}', '[{"name": "a"}]'])
def test_a_damaged_graph_is_told(name: str, content: str, tmp_path: Path) -> None:
    for each in ("jobs.json", "cells.json", "sweep.yaml"):
        (tmp_path / each).write_text('[{"name": "report", "kind": "report", "cells": [], "needs": [], "stages": []}]')
    (tmp_path / name).write_text(content)
    reads = {"jobs.json": read_jobs, "cells.json": read_cells}
    with pytest.raises(StudyError, match=f"{name}: is damaged"):
        reads[name](tmp_path)
    with pytest.raises(StudyError, match="is damaged"):
        read_status(tmp_path)
