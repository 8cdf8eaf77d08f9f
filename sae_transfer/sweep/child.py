"""One job as a child process, whichever engine starts it: what it may work on, its log, its end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sae_transfer.errors import StudyError
from sae_transfer.redaction import redacted
from sae_transfer.signals import PARENT_VARIABLE
from sae_transfer.study import PATIENCE_VARIABLE
from sae_transfer.sweep.jobs import Job, read_jobs
from sae_transfer.sweep.states import (
    Record,
    ended,
    fit_cells,
    given_back,
    is_complete,
    job_directory,
    last_error,
    now,
    read_record,
    update_record,
)

LOG_BYTES = 2**22
POLL_S = 0.1
STOP_WITHIN_S = 600.0  # checkpoints of several of the largest SAEs take minutes on a slow disk


class Child:
    """A running job. It writes the job's state when it starts and when it has ended."""

    def __init__(self, directory: Path, job: Job, cells: tuple[str, ...], environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            directory: Of the sweep.
            job: The job.
            cells: Those of its cells that are to be worked on.
            environment: Variables beyond those of this process.
        """
        self.job, self._directory = job, directory
        self._log = job_directory(directory, job.name) / "log.txt"
        with self._log.open("ab") as log:
            self._offset = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sae_transfer", *job.command(directory, cells)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **environment,
                    PARENT_VARIABLE: str(os.getpid()),
                    PATIENCE_VARIABLE: f"{STOP_WITHIN_S:g}",
                },
            )

        self._started, self._is_recorded = now(), False
        self.tend()

    def exit_code(self) -> int | None:
        """Of the process, negative for a signal; None while it runs.

        Not by Popen.poll, whose lock a signal handler that polls as well may find taken by the call it interrupted.
        """
        if self._process.returncode is not None:  # `finish` has waited for it
            return self._process.returncode
        end = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def tend(self) -> None:
        """What is to be done while it runs: record that it does, and move a log that has grown too long aside.

        Nothing that fails here, on a full disk or otherwise, ends the job: it is tried again at the next call.
        """
        with suppress(OSError, StudyError):
            if not self._is_recorded:
                update_record(self._directory, self.job.name, self._running)
                self._is_recorded = True
            # the process goes on writing to the same file, at its new end
            if self._log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self._log, self._log.with_name("log.previous.txt"))
                os.truncate(self._log, 0)
                self._offset = 0

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        if self.exit_code() is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def stop_within(self, seconds: float) -> None:
        """Ask it to write a checkpoint, wait, and end it if it does not."""
        self.stop()
        deadline = time.monotonic() + seconds
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if self.exit_code() is None:
            os.kill(self._process.pid, signal.SIGKILL)

    def finish(self) -> Record:
        """Write the end of a process that has ended, unless the job has been submitted again since it started.

        Raises:
            StudyError: It cannot be written, as on a full disk; may be called again.
        """
        code = self._process.wait()
        if not self._is_recorded:
            update_record(self._directory, self.job.name, self._running)
            self._is_recorded = True
        error = redacted(last_error(self._log, self._offset))

        def end(record: Record) -> Record:
            # an attempt's number would not tell: cancelling takes it back
            is_own = (record.host, record.pid) == (socket.gethostname(), self._process.pid)
            return ended(record, code, error) if is_own else record

        return update_record(self._directory, self.job.name, end)

    def _running(self, record: Record) -> Record:
        host, pid = socket.gethostname(), self._process.pid
        return replace(record, state="running", host=host, pid=pid, started=self._started, message="", exit_code=None)


def start(directory: Path, job: Job, environment: Mapping[str, str]) -> Child | None:
    """Start a job on those of its cells that have all it needs and are not done.

    Args:
        directory: Of the sweep.
        job: The job; what it needs has ended.
        environment: Variables beyond those of this process.

    Returns:
        The running job; None when there is nothing it can work on, which its state then says.

    Raises:
        OSError, StudyError: The disk is full; nothing was started.
    """
    jobs = {other.name: other for other in read_jobs(directory)}
    records = {name: read_record(directory, name) for name in (job.name, *job.needs)}
    fit = fit_cells(job, jobs, records, directory)
    cells = tuple(cell for cell in fit if job.kind == "report" or not is_complete(job, cell, Record(), directory))
    if cells:
        return Child(directory, job, cells, environment)
    if fit:
        update_record(directory, job.name, lambda record: replace(record, state="done", message="", ended=now()))
        return None
    unfinished = [name for name in job.needs if records[name].state != "done"] or list(job.needs)
    message = f"not started: {', '.join(f'{name} is {records[name].state}' for name in unfinished)}"
    update_record(directory, job.name, lambda record: given_back(record, message))
    return None
