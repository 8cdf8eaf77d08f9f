"""This machine as an engine: a supervisor of its own runs submitted jobs, one a slot, in the order of their needs."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.study import write_text
from sae_transfer.sweep.child import LOG_BYTES, POLL_S, STOP_WITHIN_S, Child, start
from sae_transfer.sweep.jobs import Job, read_jobs
from sae_transfer.sweep.states import LIVE, Fact, Record, read_record, submitted, update_record

logger = logging.getLogger(__name__)

SWEEP_LOCK = ".sweep.lock"  # held while a sweep command changes the directory
FIND_WITHIN_S = 5.0  # a supervisor says its number as soon as it has its lock


def count_gpus() -> int:
    """GPUs that this process may use."""
    return len(_gpus())


def set_slots(directory: Path, slots: int) -> None:
    """Say how many jobs the supervisor runs at once."""
    write_text(directory / "jobs" / "slots", str(slots))


def submit(directory: Path, jobs: Sequence[Job]) -> None:
    """Mark jobs for the supervisor, which is at work, or whose lock is claimed.

    Args:
        directory: Of the sweep; its lock is held, so that the supervisor cannot end meanwhile.
        jobs: Neither done nor live.
    """
    for job in jobs:
        update_record(directory, job.name, lambda record, job=job: submitted(record, job, "local"))


def facts(directory: Path, records: Mapping[str, Record]) -> dict[str, Fact]:
    """What can be said of live jobs from whether their supervisor lives."""
    if not records:
        return {}
    if is_supervised(directory):
        return {name: Fact(record.state) for name, record in records.items()}
    became = {
        "running": Fact("killed", "the supervisor on this machine was ended"),
        "submitted": Fact("pending", "the supervisor on this machine was ended before its turn"),
    }
    return {name: became[record.state] for name, record in records.items()}


def is_supervised(directory: Path) -> bool:
    """Whether a supervisor is at work."""
    try:
        with _supervisor_lock(directory).acquire(timeout=0):
            return False
    except Timeout:
        return True


def start_supervisor(directory: Path) -> None:
    """Start a supervisor that outlives this process, unless one is at work already."""
    environment = {key: value for key, value in os.environ.items() if key != signals.PARENT_VARIABLE}
    said = directory / "jobs" / "supervisor.log"  # two lines a job
    if said.exists() and said.stat().st_size > LOG_BYTES:
        said.replace(said.with_name("supervisor.previous.log"))
    with said.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sae_transfer.sweep.local", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
    while not is_supervised(directory):
        if process.poll() is not None:
            raise StudyError(
                f"the process that runs the jobs ended at once, with exit code {process.returncode}", f"read {said}"
            )
        time.sleep(POLL_S)
        signals.check()


def cancel(directory: Path) -> None:
    """Have the supervisor stop its jobs, which write their checkpoints, and wait until it has ended.

    Raises:
        StudyError: It is not a process of this machine.
    """
    deadline, pid = time.monotonic() + FIND_WITHIN_S, None
    while is_supervised(directory):
        if pid is None and (pid := _supervisor(directory)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if pid is None and time.monotonic() > deadline:
            raise StudyError(
                f"{directory}: the process that runs its jobs is not on this machine",
                "cancel it on the machine it is on",
            )
        time.sleep(POLL_S)
        signals.check()


def claim(directory: Path) -> FileLock | None:
    """Take the supervisor's lock, for `supervise`; None where a supervisor is at work."""
    lock = _supervisor_lock(directory)
    try:
        lock.acquire(timeout=5)  # who asks whether one is at work holds it for a moment
    except Timeout:
        return None
    return lock


def supervise(directory: Path, lock: FileLock) -> None:
    """Run submitted jobs until none is left, also those submitted meanwhile.

    Args:
        directory: Of the sweep.
        lock: As `claim` gave it; it is let go at the end.

    Raises:
        Stopped: A signal asked for it; the jobs were stopped, and have written their checkpoints.
    """
    slots: dict[int, Child | None] = {}
    complaints: set[str] = set()
    with signals.deferred(), ExitStack() as at_the_end:
        at_the_end.callback(_leave, directory, lock)  # last, whatever happens before
        at_the_end.callback(_stop, slots)
        write_text(_pid_file(directory), str(os.getpid()))
        while True:
            signals.check()
            _collect(slots, complaints)
            wanted = int((directory / "jobs" / "slots").read_text())
            waiting = _fill(directory, slots, wanted, complaints)
            if not waiting and not any(slots.values()) and _ended(directory, lock):
                return
            time.sleep(POLL_S)


def slot_environment(slot: int, slots: int) -> dict[str, str]:
    """The share of this machine that a slot's jobs get: one of the GPUs, and an equal part of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus()
    share = {"OMP_NUM_THREADS": str(max(1, cores // slots))}
    return {**share, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else share


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


def _supervisor_lock(directory: Path) -> FileLock:
    return FileLock(directory / "jobs" / "supervisor.lock")


def _pid_file(directory: Path) -> Path:
    return directory / "jobs" / "supervisor.pid"


def _leave(directory: Path, lock: FileLock) -> None:
    """Let go of the lock, once; from then on the file of the number may be another's."""
    if lock.is_locked:
        _pid_file(directory).unlink(missing_ok=True)
        lock.release()


def _supervisor(directory: Path) -> int | None:
    """Number of the supervisor's process on this machine; None while it has not said it, or where it is not here."""
    try:
        pid = int(_pid_file(directory).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if not Path("/proc/self").exists():
        return pid
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return None
    return pid if "sae_transfer" in command or "sae-transfer" in command else None


def _collect(slots: dict[int, Child | None], complaints: set[str]) -> None:
    """Free the slots of jobs that have ended, and keep the logs of the others short."""
    for slot, child in slots.items():
        if child is None:
            continue
        if child.exit_code() is None:
            child.tend()
            continue
        with _tried_again(child.job, complaints):
            record = child.finish()
            logger.info("%s: %s%s", child.job.name, record.state, f": {record.message}" if record.message else "")
            slots[slot] = None


def _fill(directory: Path, slots: dict[int, Child | None], wanted: int, complaints: set[str]) -> bool:
    """Start what can start in the slots that are free; whether anything waits still."""
    jobs = read_jobs(directory)
    records = {job.name: read_record(directory, job.name) for job in jobs}
    waiting = [job for job in jobs if records[job.name].state == "submitted" and records[job.name].engine == "local"]
    for job in waiting:
        slot = next((slot for slot in range(wanted) if slots.get(slot) is None), None)
        if slot is None:
            break
        if not any(records[need].state in LIVE for need in job.needs):
            with _tried_again(job, complaints):
                slots[slot] = start(directory, job, slot_environment(slot, wanted))
                if slots[slot] is not None:
                    logger.info("%s: started in slot %d of %d", job.name, slot + 1, wanted)
            records[job.name] = read_record(directory, job.name)
    return bool(waiting)


@contextmanager
def _tried_again(job: Job, complaints: set[str]) -> Iterator[None]:
    """Let pass what fails for want of space or otherwise, as it will be tried again; say it once."""
    try:
        yield
    except (OSError, StudyError) as error:
        if str(error) not in complaints:
            logger.warning("%s: tried again until it succeeds: %s", job.name, error)
            complaints.add(str(error))


def _ended(directory: Path, lock: FileLock) -> bool:
    """Whether nothing is left. Then the lock is let go before a sweep command can look whether someone is at work."""
    try:
        with FileLock(directory / SWEEP_LOCK).acquire(timeout=0):
            jobs = read_jobs(directory)
            records = [read_record(directory, job.name) for job in jobs]
            if any(record.state == "submitted" and record.engine == "local" for record in records):
                return False
            _leave(directory, lock)
            return True
    except Timeout:
        return False


def _stop(slots: dict[int, Child | None]) -> None:
    children = [child for child in slots.values() if child is not None]
    for child in children:
        child.stop()
    for child in children:
        child.stop_within(STOP_WITHIN_S)
        while child.exit_code() is None:
            time.sleep(POLL_S)
        with suppress(OSError, StudyError):  # whoever looks next sees that nobody supervises it
            child.finish()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        with signals.installed():
            if (claimed := claim(Path(sys.argv[1]))) is not None:
                supervise(Path(sys.argv[1]), claimed)
    except signals.Stopped as stop:
        sys.exit(stop.exit_code)
