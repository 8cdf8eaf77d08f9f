"""What is known of each job, in files of our own; what a scheduler says corrects them where a job could not."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock

from sae_transfer.errors import StudyError
from sae_transfer.signals import EXIT_INTERRUPTED, EXIT_STOPPED
from sae_transfer.study import write_json
from sae_transfer.sweep.cells import cell_directory
from sae_transfer.sweep.jobs import Job

State = Literal["pending", "submitted", "running", "done", "failed", "killed", "timeout", "lost"]
STATES: tuple[State, ...] = ("pending", "submitted", "running", "done", "failed", "killed", "timeout", "lost")
LIVE = ("submitted", "running")
BROKEN = ("failed", "killed", "timeout", "lost")
LOG_TAIL_BYTES, MESSAGE_CHARS = 2**14, 500


@dataclass(frozen=True)
class Record:
    """What is known of a job.

    Attributes:
        state: `pending` is not submitted; `killed` ended without finishing and can go on; `failed` will fail again;
            `lost` was submitted, and nothing knows of it any more.
        cells: Ids of those that it is for.
        attempts: Submissions; those that the user cancelled or that found nothing to do do not count.
        engine: What it was submitted to last.
        scheduler_id: The scheduler's name for it.
        host: Where it ran last.
        pid: Of its process there.
        exit_code: Of its last end; negative for a signal.
        message: What a person should know.
        submitted: When, UTC, as started and ended.
        started: Of the last attempt.
        ended: Of the last attempt.
    """

    state: State = "pending"
    cells: tuple[str, ...] = ()
    attempts: int = 0
    engine: Literal["slurm", "local"] | None = None
    scheduler_id: str | None = None
    host: str | None = None
    pid: int | None = None
    exit_code: int | None = None
    message: str = ""
    submitted: str | None = None
    started: str | None = None
    ended: str | None = None


@dataclass(frozen=True)
class Fact:
    """What a scheduler says of a job.

    Attributes:
        state: `submitted` while it waits, `running`, or what it has become.
        detail: In the scheduler's words.
    """

    state: State
    detail: str = ""


@dataclass(frozen=True)
class CellState:
    """Where a cell is: one entry of `status --json`."""

    id: str
    state: State
    stage: str
    job: str
    message: str


def now() -> str:
    """The time, UTC, as in every record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def job_directory(directory: Path, job: str) -> Path:
    """Where a job's state and log are."""
    return directory / "jobs" / job


def read_record(directory: Path, job: str) -> Record:
    """The state of a job; `pending` when none was written.

    Raises:
        StudyError: Another version wrote it.
    """
    try:
        found = json.loads((job_directory(directory, job) / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Record()
    if unknown := sorted(set(found) - {field.name for field in fields(Record)}):
        raise StudyError(
            f"{directory}: was written by another version of sae-transfer (its records have {', '.join(unknown)})",
            "use that version here, or another --out DIR",
        )
    return Record(**{**found, "cells": tuple(found["cells"])})


def update_record(directory: Path, job: str, change: Callable[[Record], Record]) -> Record:
    """Change a job's state, one process at a time.

    Args:
        directory: Of the sweep.
        job: Its name.
        change: New record of the present one.

    Returns:
        The record as it is now.
    """
    place = job_directory(directory, job)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):
        before = read_record(directory, job)
        after = change(before)
        if after != before:
            write_json(place / "state.json", asdict(after))
    return after


def submitted(record: Record, job: Job, engine: Literal["slurm", "local"]) -> Record:
    """A record once its job is about to be handed to an engine."""
    return Record("submitted", job.cells, record.attempts + 1, engine, submitted=now())


def given_back(record: Record, message: str) -> Record:
    """A record of a job that never began, or had nothing to begin with: as if it had not been submitted."""
    return replace(record, state="pending", attempts=max(0, record.attempts - 1), message=message, ended=now())


def ended(record: Record, exit_code: int, error: str) -> Record:
    """A record once its process has ended.

    Args:
        record: Before.
        exit_code: Of the process; negative for a signal.
        error: The last error in its log.

    Returns:
        The record after.
    """
    if exit_code == 0:
        state, message = "done", ""
    elif exit_code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        state, message = "killed", "stopped early with a checkpoint; the same sweep command goes on from it"
    elif exit_code < 0:
        state, message = "killed", f"ended by signal {-exit_code}{', maybe out of memory' if exit_code == -9 else ''}"
    else:
        state, message = "failed", error or f"exit code {exit_code}"
    return replace(record, state=state, exit_code=exit_code, message=message, ended=now())


def reconcile(record: Record, fact: Fact | None) -> Record:
    """Correct a record by what its scheduler says, asked before the record was read.

    A job writes its own end, so a record that is not live stands; but for one that its scheduler has put back into the
    queue. A live record whose job has ended means that the job was ended too suddenly to write it.

    Args:
        record: As the job left it.
        fact: None when the scheduler does not know the job.

    Returns:
        The record to believe.
    """
    if record.state not in LIVE:
        # a job that has said its end is still seen to run while its scheduler clears up
        requeued = record.state == "killed" and fact is not None and fact.state == "submitted"
        return replace(record, state="submitted", message=fact.detail) if requeued and fact else record
    if fact is None and record.scheduler_id is None and _is_recent(record.submitted):
        return record  # it is being submitted at this moment
    if fact is None:
        message = "the scheduler does not know it any more, and it did not write its end"
        return replace(record, state="lost", message=message, ended=now())
    if fact.state == "pending":
        return given_back(record, fact.detail)
    if fact.state in LIVE:
        # its own word that it runs comes only once Python has started
        message = record.message if fact.state == "running" else record.message or fact.detail
        return replace(record, state=fact.state, message=message)
    return replace(record, state=fact.state, message=fact.detail, ended=now())


def is_complete(job: Job, cell: str, record: Record, directory: Path) -> bool:
    """Whether a job has done its part for one of its cells. Training says so in the cell's own stage records."""
    if job.kind in ("evaluate", "report"):
        return record.state == "done"
    stages = cell_directory(directory, cell) / "stages"
    return all((stages / f"{stage}.json").exists() for stage in job.stages)


def fit_cells(job: Job, jobs: Mapping[str, Job], records: Mapping[str, Record], directory: Path) -> tuple[str, ...]:
    """The cells of a job for which all that it needs is done: for a report, all."""
    if job.kind == "report":
        return job.cells
    needed = [jobs[name] for name in job.needs]
    return tuple(
        cell
        for cell in job.cells
        if all(is_complete(need, cell, records[need.name], directory) for need in needed if cell in need.cells)
    )


def choose(
    jobs: Sequence[Job],
    records: Mapping[str, Record],
    directory: Path,
    *,
    retry_failed: bool,
    max_attempts: int,
) -> tuple[list[Job], dict[str, str]]:
    """Which jobs to submit now: those that are neither done nor live, may be tried, and will have what they need.

    Args:
        jobs: All, each after those it needs.
        records: Reconciled, by job.
        directory: Of the sweep.
        retry_failed: Also those that failed, or have used their attempts.
        max_attempts: Of a job that was killed, lost or timed out.

    Returns:
        The jobs to submit, and why others that are not done are held back, by job.
    """
    chosen: dict[str, Job] = {}
    held: dict[str, str] = {}
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        record = records[job.name]
        if job.kind == "report" or record.state in LIVE:
            continue
        if all(is_complete(job, cell, record, directory) for cell in job.cells):
            continue
        if record.state == "failed" and not retry_failed:
            held[job.name] = f"failed; --retry-failed tries it again: {record.message}"
        elif record.state in BROKEN and record.attempts >= max_attempts and not retry_failed:
            held[job.name] = (
                f"{record.state} in attempt {record.attempts} of {max_attempts}; --retry-failed tries again"
            )
        elif not any(_can_come(job, cell, by_name, records, chosen, directory) for cell in job.cells):
            held[job.name] = "what it needs is held back"
        else:
            chosen[job.name] = job
    report = next((job for job in jobs if job.kind == "report"), None)
    if report is not None and (chosen or _wants_report(report, records)):
        chosen[report.name] = report
    return list(chosen.values()), held


def cell_states(
    cells: Sequence[str], jobs: Sequence[Job], records: Mapping[str, Record], directory: Path
) -> list[CellState]:
    """Where each cell is, from its jobs and its run directory: what is broken goes before what runs or waits."""
    return [_cell_state(cell, jobs, records, directory) for cell in cells]


def last_error(log: Path, offset: int = 0) -> str:
    """The last error that a process wrote to its log, at most 500 characters.

    Args:
        log: The file.
        offset: Where the process began to write.

    Returns:
        From its last line `error: ...` on, else its last line.
    """
    lines = tail(log, offset)
    starts = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[starts[-1] :] if starts else lines[-1:]
    return "\n".join(said).removeprefix("error: ")[:MESSAGE_CHARS]


def tail(log: Path, offset: int = 0) -> list[str]:
    """The last lines of a log, without empty ones; none when there is no log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(offset, size - LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _is_recent(when: str | None) -> bool:
    return when is not None and (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds() < 600


def _wants_report(report: Job, records: Mapping[str, Record]) -> bool:
    """Whether the report is missing, or an evaluation has ended since it was written."""
    record = records[report.name]
    is_old = any((records[need].ended or "") > (record.ended or "") for need in report.needs)
    return record.state not in LIVE and (record.state != "done" or is_old)


def _can_come(
    job: Job,
    cell: str,
    jobs: Mapping[str, Job],
    records: Mapping[str, Record],
    chosen: Mapping[str, Job],
    directory: Path,
) -> bool:
    """Whether a cell will have all that a job needs: it has, or a job is on its way."""
    needed = [jobs[name] for name in job.needs if cell in jobs[name].cells]
    return all(
        need.name in chosen
        or records[need.name].state in LIVE
        or is_complete(need, cell, records[need.name], directory)
        for need in needed
    )


def _cell_state(cell: str, jobs: Sequence[Job], records: Mapping[str, Record], directory: Path) -> CellState:
    own = [job for job in jobs if job.kind != "report" and cell in job.cells]
    left = [job for job in own if not is_complete(job, cell, records[job.name], directory)]
    if not own:
        return CellState(cell, "pending", "", "", "no job is planned for it; the same sweep command plans it")
    if not left:
        return CellState(cell, "done", "", own[-1].name, "")

    def rank(job: Job) -> int:
        state = records[job.name].state
        # a job that is done for others and not for this cell waits for what this cell lacks
        return ("failed", "killed", "timeout", "lost", "running", "submitted", "pending", "done").index(state)

    job = min(left, key=rank)
    record = records[job.name]
    state = "pending" if record.state == "done" else record.state
    message = record.message
    if state == "running":
        message = next(iter(tail(job_directory(directory, job.name) / "log.txt")[-1:]), "")[:MESSAGE_CHARS]
    return CellState(cell, state, _stage(job, cell, directory), job.name, message)


def _stage(job: Job, cell: str, directory: Path) -> str:
    """The first stage of a job that has no record yet; the last one, the report, has none."""
    stages = cell_directory(directory, cell) / "stages"
    return next((stage for stage in job.stages if not (stages / f"{stage}.json").exists()), job.kind)
