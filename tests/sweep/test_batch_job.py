"""What the process of a batch job does on SLURM's signals, without a SLURM."""

import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_transfer import signals
from sae_transfer.sweep import slurm
from sae_transfer.sweep.file import Launcher
from sae_transfer.sweep.jobs import Job, write_jobs
from sae_transfer.sweep.states import Record, read_record, submitted, update_record
from tests.asking import Dying

REPORT = Job("report", "report", (), (), ())


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*signals.SCHEDULERS, signal.SIGCONT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_job_outlives_a_signal_that_comes_before_its_handlers() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('goes on')"
    done = subprocess.run(
        ["bash", "-c", f"{slurm.PYTHON} -u -c {shlex.quote(program)}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_a_signal_while_the_record_is_written_is_answered_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jobs([REPORT], tmp_path)
    update_record(tmp_path, "report", lambda record: submitted(record, REPORT, "slurm"))
    job = slurm.BatchJob(str(tmp_path), "report", 90)
    signal.signal(signal.SIGUSR2, lambda *_: job.checkpoint())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    seen: list[str | None] = []

    def preempt(record: Record, **changes: Any) -> Record:
        if "scheduler_id" in changes:  # the lock of the record is held
            signal.raise_signal(signal.SIGUSR2)
            seen.append(read_record(tmp_path, "report").scheduler_id)
        return replace(record, **changes)

    monkeypatch.setattr(slurm, "replace", preempt)
    monkeypatch.setattr(slurm, "start", lambda *_: None)
    job()
    after = read_record(tmp_path, "report")
    assert seen == [None]
    assert (after.scheduler_id, after.state) == ("7", "submitted") and "preempted" in after.message


def test_a_second_signal_does_not_interrupt_the_way_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_record(tmp_path, "report", lambda record: submitted(record, REPORT, "slurm"))
    job = slurm.BatchJob(str(tmp_path), "report", 90)
    asked: list[int] = []

    def checkpoint(*_: object) -> None:
        asked.append(1)
        job.checkpoint()

    def preempt_again(record: Record, **changes: Any) -> Record:
        signal.raise_signal(signal.SIGUSR2)  # the lock of the record is held
        signal.raise_signal(signal.SIGTERM)
        return replace(record, **changes)

    monkeypatch.setattr(slurm, "replace", preempt_again)
    signal.signal(signal.SIGUSR2, checkpoint)
    signal.raise_signal(signal.SIGUSR2)
    assert asked == [1]
    assert read_record(tmp_path, "report").message.startswith("preempted")


def test_a_time_limit_that_comes_while_a_job_starts_is_written_and_nothing_logs_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jobs([REPORT], tmp_path)
    update_record(tmp_path, "report", lambda record: submitted(record, REPORT, "slurm"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def out_of_time(*_: object) -> None:
        raise slurm.UncompletedJobError("timed-out too many times.")

    signal.signal(signal.SIGUSR2, out_of_time)
    signal.signal(signal.SIGCONT, lambda *_: None)
    seen: list[object] = []

    def start(*_: object) -> None:
        seen.append(signal.getsignal(signal.SIGCONT))
        signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(slurm, "start", start)
    with pytest.raises(slurm.UncompletedJobError):
        slurm.BatchJob(str(tmp_path), "report", 90)()
    after = read_record(tmp_path, "report")
    assert after.state == "timeout" and "too many times" in after.message
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize(
    "record", [Record("submitted", engine="slurm", scheduler_id="8"), Record("pending", scheduler_id="7")]
)
def test_a_job_that_was_submitted_anew_or_taken_back_does_nothing(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jobs([REPORT], tmp_path)
    update_record(tmp_path, "report", lambda _: record)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slurm.BatchJob(str(tmp_path), "report", 90)()
    assert read_record(tmp_path, "report") == record


def test_nothing_is_submitted_once_asked_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_submit_array", lambda *_, **__: pytest.fail("submitted"))
    with signals.installed():
        Dying()
        with pytest.raises(signals.Stopped):
            slurm.submit(tmp_path, [REPORT], {}, Launcher())
