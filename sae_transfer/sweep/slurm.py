"""SLURM as an engine, through submitit; the only module that imports it."""

import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.core.utils import DelayedSubmission, UncompletedJobError
from submitit.slurm.slurm import SlurmJobEnvironment

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.sweep import queue
from sae_transfer.sweep.child import POLL_S, STOP_WITHIN_S, Child, start
from sae_transfer.sweep.file import Launcher
from sae_transfer.sweep.jobs import Job, read_jobs
from sae_transfer.sweep.states import LIVE, Record, given_back, now, read_record, submitted, update_record

REPORT_MEM_GB = 8.0
RETRY_S = 5.0
KILLED_WITHIN_S = 120.0  # after being put back into the queue
PREEMPTED = "preempted or out of time; goes on from its checkpoint"
# A job that is preempted while Python starts has no handler yet and would end as failed. So it ignores the signal until
# then, and SLURM takes it off its node and back into the queue when its time of grace is over.
PYTHON = f"""sh -c 'trap "" USR1 USR2; exec "$0" "$@"' {shlex.quote(sys.executable)}"""
STOP_FRACTION = 0.7  # of the signal's lead that a checkpoint may take; the rest is for going back into the queue


@contextmanager
def _deferred() -> Iterator[None]:
    """Hold SLURM's signals back for the length of the block.

    Their handlers change the job's record, and would wait for its lock forever if they interrupted who holds it. A mask
    does not do: another thread may take the signal, and Python then runs the handler in this one.
    """
    came: list[int] = []
    # what is no function stays: submitit may have a signal print a stack by means that Python does not see
    held = [number for number in signals.SCHEDULERS if callable(signal.getsignal(number))]
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in held}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


class BatchJob:
    """What submitit runs: paths only, so that nothing of this version of the package is frozen into a queue."""

    def __init__(self, directory: str, job: str, signal_delay_s: int) -> None:
        """Name a job.

        Args:
            directory: Of the sweep, absolute.
            job: Its name.
            signal_delay_s: How long before the limit SLURM sends its signal.
        """
        self.directory, self.job, self.signal_delay_s = directory, job, signal_delay_s
        self._child: Child | None = None
        self._is_asked = False

    def __call__(self) -> None:
        """Run the job as a child process and write what became of it."""
        directory = Path(self.directory)
        job = next((job for job in read_jobs(directory) if job.name == self.job), None)
        if job is None:
            return  # its cells have smaller jobs since
        slurm_id = SlurmJobEnvironment().job_id
        # submitit logs SIGCONT, which SLURM sends just before the signal of a time limit: what that one raises would be
        # raised in the logging, and end there
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        try:
            with _deferred():
                before = read_record(directory, self.job)
                if before.state == "pending" or before.scheduler_id not in (None, slurm_id):
                    return  # it was taken back, or another submission of it goes ahead
                update_record(directory, self.job, lambda record: replace(record, scheduler_id=slurm_id))
                threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
                self._child = child = start(directory, job, {"OMP_NUM_THREADS": threads})
            if child is None:
                return
            # scancel, and preemption where SLURM sends no other signal first
            signal.signal(signal.SIGTERM, lambda *_: self._stop())
            while child.exit_code() is None:
                child.tend()
                time.sleep(POLL_S)
        except UncompletedJobError as error:  # raised by submitit's signal handler, after `checkpoint`
            message = f"reached its time limit; {error}"
            with _deferred():
                update_record(
                    directory, self.job, lambda record: replace(record, state="timeout", message=message, ended=now())
                )
            raise
        record = self._finish(child)
        if record.state == "killed" and self._is_asked:
            self._go_on_later(slurm_id)
        if record.state != "done":
            sys.exit(1)

    def _go_on_later(self, slurm_id: str) -> None:
        """After SIGTERM: SLURM puts a preempted job back into its queue, but not one that ends before it is killed."""
        directory = Path(self.directory)
        if not queue.is_running(slurm_id):
            return
        with _deferred():
            before = read_record(directory, self.job)
            update_record(directory, self.job, lambda record: replace(record, state="submitted", message=PREEMPTED))
        try:
            queue.requeue(slurm_id)
        except StudyError:
            update_record(directory, self.job, lambda _: before)
            raise
        time.sleep(KILLED_WITHIN_S)

    def _finish(self, child: Child) -> Record:
        """Write the job's end; while the disk is full, for some minutes, again and again."""
        deadline = time.monotonic() + STOP_WITHIN_S
        while True:
            try:
                with _deferred():
                    record, self._child = child.finish(), None
                    return record
            except (OSError, StudyError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def _stop(self) -> None:
        self._is_asked = True
        if self._child is not None:
            self._child.stop()

    def checkpoint(self) -> DelayedSubmission:
        """Stop the child, which writes its checkpoint, and go back into the queue; submitit calls this on a signal."""
        # from here on this process ends; another signal would begin this again inside itself, and wait for its own lock
        for number in signals.SCHEDULERS:
            signal.signal(number, signal.SIG_IGN)
        if self._child is not None:
            self._child.stop_within(STOP_FRACTION * self.signal_delay_s)
        update_record(
            Path(self.directory), self.job, lambda record: replace(record, state="submitted", message=PREEMPTED)
        )
        return DelayedSubmission(BatchJob(self.directory, self.job, self.signal_delay_s))


def submit(directory: Path, jobs: Sequence[Job], records: Mapping[str, Record], launcher: Launcher) -> None:
    """Submit jobs, those of one kind that wait for the same ones as one array.

    A job starts when all that it needs has ended, well or not (`afterany`): nothing can hang, and each job looks by
    itself which of its cells have what they need.

    Args:
        directory: Of the sweep, absolute.
        jobs: Neither done nor live, each after those it needs.
        records: Of all jobs, by name.
        launcher: What jobs ask for.

    Raises:
        StudyError: There is no SLURM, or it refuses some; these are pending again, and those before them submitted.
    """
    ids = {name: record.scheduler_id for name, record in records.items() if record.state in LIVE}
    arrays: dict[tuple[bool, tuple[str, ...]], list[Job]] = defaultdict(list)
    for job in jobs:
        arrays[job.kind == "report", job.needs].append(job)
    for (is_report, needs), members in arrays.items():
        waits_for = [known for need in needs if (known := ids.get(need))]
        signals.check()
        with signals.deferred():  # a job that SLURM has and no file knows could not be cancelled
            ids |= _submit_array(directory, members, launcher, waits_for, is_report=is_report)


def _submit_array(
    directory: Path, members: Sequence[Job], launcher: Launcher, waits_for: Sequence[str], *, is_report: bool
) -> dict[str, str]:
    """Submit jobs as one array; SLURM's ids by name."""
    for job in members:
        update_record(directory, job.name, lambda record, job=job: submitted(record, job, "slurm"))
    try:
        executor = _executor(directory, launcher, waits_for, is_report=is_report)
        with executor.batch():
            handles = [executor.submit(BatchJob(str(directory), job.name, launcher.signal_delay_s)) for job in members]
    except (RuntimeError, OSError) as error:  # submitit's errors are RuntimeErrors
        for job in members:
            update_record(directory, job.name, lambda record: given_back(record, "not submitted"))
        signals.check()  # Ctrl-C ends sbatch as well
        raise StudyError(
            f"SLURM refuses {', '.join(job.name for job in members)}: {error}",
            "mend launcher in the sweep file; ask SLURM: sinfo. What it took before these stays submitted",
        ) from error
    ids = {job.name: handle.job_id for job, handle in zip(members, handles, strict=True)}
    for name, slurm_id in ids.items():
        update_record(directory, name, lambda record, slurm_id=slurm_id: replace(record, scheduler_id=slurm_id))
    return ids


def _executor(directory: Path, launcher: Launcher, waits_for: Sequence[str], *, is_report: bool) -> AutoExecutor:
    """An executor whose jobs ask for what the launcher says; the report needs no GPU and one core."""
    cores = 1 if is_report else launcher.cpus_per_job
    executor = AutoExecutor(
        folder=directory / "jobs" / "slurm",
        cluster="slurm",
        slurm_max_num_timeout=launcher.max_timeouts,
        slurm_python=PYTHON,
    )
    asked: dict[str, Any] = {
        "name": "sae-report" if is_report else "sae-transfer",
        "timeout_min": launcher.timeout_min,
        "mem_gb": min(REPORT_MEM_GB, launcher.mem_gb) if is_report and launcher.mem_gb else launcher.mem_gb,
        "cpus_per_task": cores,
        "gpus_per_node": None if is_report else launcher.gpus_per_job or None,
        "slurm_partition": launcher.partition,
        "slurm_account": launcher.account,
        "slurm_signal_delay_s": launcher.signal_delay_s,
        "slurm_array_parallelism": launcher.array_parallelism,
        "slurm_setup": list(launcher.setup) or None,
        "slurm_dependency": f"afterany:{':'.join(waits_for)}" if waits_for else None,
        # srun takes no number of cores from sbatch since SLURM 22.05
        "slurm_srun_args": [f"--cpus-per-task={cores}"],
        "slurm_additional_parameters": {"requeue": True, **launcher.slurm},
    }
    executor.update_parameters(**{key: value for key, value in asked.items() if value is not None})
    return executor
