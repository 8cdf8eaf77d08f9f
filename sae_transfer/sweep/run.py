"""The verbs of a sweep: submit what is neither done nor live, say where everything is, cancel."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sae_transfer import signals
from sae_transfer.cost.device import Device
from sae_transfer.errors import StudyError, first_line
from sae_transfer.study import write_text
from sae_transfer.sweep import local, queue
from sae_transfer.sweep.cells import Cell, expand, freeze, read_cells, require_all_there
from sae_transfer.sweep.costs import job_costs
from sae_transfer.sweep.file import Launcher, SweepFile, load_sweep, read_launcher, sweep_yaml
from sae_transfer.sweep.jobs import REPORT, Job, plan_jobs, read_jobs, takes_over, write_jobs
from sae_transfer.sweep.states import (
    LIVE,
    STATES,
    CellState,
    Fact,
    Record,
    cell_states,
    choose,
    given_back,
    read_record,
    reconcile,
    update_record,
)

logger = logging.getLogger(__name__)

POLL_S = {"slurm": 10.0, "local": 1.0}
SWEEP_FILE = "sweep.yaml"


@dataclass(frozen=True)
class Status:
    """Where a sweep is.

    Attributes:
        cells: Of all cells asked for.
        report: State of the combined report.
        is_live: Whether anything is submitted or runs.
    """

    cells: tuple[CellState, ...]
    report: str
    is_live: bool

    @property
    def counts(self) -> dict[str, int]:
        """Cells in each state; every state is there."""
        return {state: Counter(cell.state for cell in self.cells)[state] for state in STATES}

    def as_json(self) -> dict[str, Any]:
        """What `status --json` prints."""
        return {"counts": self.counts, "cells": [asdict(cell) for cell in self.cells]}


def is_sweep(directory: Path) -> bool:
    """Whether a directory is a sweep's; a file of the sweep's name may be anyone's."""
    return all((directory / name).is_file() for name in (SWEEP_FILE, "jobs.json", "cells.json"))


def describe(path: Path, directory: Path, overrides: Sequence[str], device: Device, *, gpu: bool) -> Iterator[str]:
    """The jobs of a sweep and what each will cost; nothing is written or submitted.

    Args:
        path: The sweep file.
        directory: Where it would go.
        overrides: `--set` arguments for every study.
        device: What the jobs run on.
        gpu: Whether that is a GPU.

    Yields:
        Lines of text.

    Raises:
        StudyError: Something is wrong with the sweep or a cell.
    """
    sweep = load_sweep(path)
    cells = expand(sweep, overrides)
    require_all_there(cells, directory)
    jobs, records = _planned(sweep, cells, directory)
    costs = job_costs(jobs, {cell.id: cell.study for cell in cells}, device, gpu=gpu)
    yield f"{len(cells)} cells, {len(jobs)} jobs, engine {sweep.launcher.engine}, in {directory}"
    for cell in cells:
        yield f"cell  {cell.id}"
    for job in jobs:
        cost = costs.get(job.name)
        words = f"{cost.memory_gib:,.2f} GiB on the device, about {_duration(cost.hours)}" if cost else "seconds"
        state = records[job.name].state
        cells_of = f"{len(job.cells)} cell{'s'[: len(job.cells) != 1]}"
        yield f"job   {job.name}: {cells_of}, {words}{'' if state == 'pending' else f'; {state} already'}"
    total = sum(cost.hours for cost in costs.values())
    yield f"about {_duration(total)} in all on {device.name}, one job after the other"


def submit_sweep(
    path: Path,
    directory: Path,
    overrides: Sequence[str] = (),
    *,
    retry_failed: bool = False,
    slots: int | None = None,
    foreground: bool = False,
) -> int:
    """Write what a sweep consists of and submit what is neither done nor live.

    Args:
        path: The sweep file.
        directory: The sweep's; a later call with more cells adds these.
        overrides: `--set` arguments for every study.
        retry_failed: Also what failed or has used its attempts.
        slots: Jobs at once of the engine local; None: as the launcher says.
        foreground: Run the jobs of the engine local here, and return when none is left.

    Returns:
        How many jobs were submitted.

    Raises:
        StudyError: Something is wrong with the sweep, a cell or the directory, and nothing was submitted; or SLURM
            refuses some jobs, and what it took before them was.
        Stopped: A signal asked for it; jobs that run here have written their checkpoints.
    """
    sweep = load_sweep(path)
    cells = expand(sweep, overrides)
    directory = directory.absolute()
    if directory.exists() and (not directory.is_dir() or (any(directory.iterdir()) and not _is_ours(directory))):
        raise StudyError(f"{directory}: is not empty, and not a sweep's directory", "an empty or new --out DIR")
    if path.resolve() == (directory / SWEEP_FILE).resolve() and not is_sweep(directory):
        raise StudyError(f"{path}: would be overwritten by the sweep's own {SWEEP_FILE}", "an empty or new --out DIR")
    with _locked(directory):
        jobs = _write(sweep, cells, directory)
        records = _reconciled(directory, jobs)
        attempts = sweep.launcher.max_attempts
        chosen, held = choose(jobs, records, directory, retry_failed=retry_failed, max_attempts=attempts)
        if waiting := _waiting_in_slurm_for(chosen, jobs, records):
            # they wait for the end of attempts that these replace: they are to wait for these
            queue.cancel(record.scheduler_id for record in waiting.values() if record.scheduler_id)
            for name in waiting:
                records[name] = update_record(directory, name, lambda record: given_back(record, "to wait anew"))
            chosen, held = choose(jobs, records, directory, retry_failed=retry_failed, max_attempts=attempts)
        for name, reason in held.items():
            logger.warning("%s: not submitted: %s", name, reason)
        lock = local.claim(directory) if foreground and chosen and sweep.launcher.engine == "local" else None
        if sweep.launcher.engine == "local":  # also where nothing is to be done: `wait` reads it
            local.set_slots(directory, slots or sweep.launcher.slots or local.count_gpus() or 1)
        if chosen:
            _withdraw_report(directory, records)
            _hand_over(directory, chosen, records, sweep.launcher, foreground)
    live = sum(record.state in LIVE for record in records.values())
    logger.info("%d jobs submitted, %d live already, %d held back", len(chosen), live, len(held))
    if lock is not None:
        local.supervise(directory, lock)
    return len(chosen)


def read_status(directory: Path) -> Status:
    """Where a sweep is, after its files were corrected by what its engine says.

    Raises:
        StudyError: It is no sweep's directory, or the engine does not answer.
    """
    _require_sweep(directory)
    jobs = read_jobs(directory)
    try:
        records = _reconciled(directory.absolute(), jobs)
    except OSError as error:  # someone else's sweep
        logger.warning("%s: cannot be written (%s); this is what its files say", directory, error.strerror or error)
        records = _as_written(directory, jobs)
    ids = [cell["id"] for cell in read_cells(directory)]
    return Status(
        tuple(cell_states(ids, jobs, records, directory)),
        records[REPORT].state,
        any(record.state in LIVE for record in records.values()),
    )


def cells_for_report(directory: Path) -> list[CellState]:
    """Where each cell is; none, with a warning, where that cannot be said: the report of the others is made."""
    try:
        return list(read_status(directory).cells)
    except (StudyError, OSError, ValueError, KeyError, TypeError) as error:  # no answer, or damaged files
        logger.warning("where the cells without results are is not known: %s", first_line(error))
        return []


def wait(directory: Path, every_s: float | None = None) -> Status:
    """Stay until nothing is live, saying what changes; jobs of the engine local that nobody runs are run here.

    Args:
        directory: Of the sweep.
        every_s: How often to look; None: as suits the engine.

    Returns:
        Where everything is then.

    Raises:
        Stopped: A signal asked for it; jobs that run here have written their checkpoints.
    """
    directory = directory.absolute()
    launcher = read_launcher(directory / SWEEP_FILE)
    if launcher.engine == "local" and (lock := local.claim(directory)) is not None:
        local.supervise(directory, lock)
    said = None
    while True:
        status = read_status(directory)
        counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
        if counts != said:
            logger.info("cells: %s", counts)
            said = counts
        if not status.is_live:
            return status
        time.sleep(every_s or POLL_S[launcher.engine])
        signals.check()


def cancel_sweep(directory: Path) -> int:
    """Cancel every live job; those that run write a checkpoint, and the same sweep command goes on from it.

    Returns:
        How many were live.

    Raises:
        StudyError: It is no sweep's directory, or the engine does not answer.
    """
    _require_sweep(directory)
    directory = directory.absolute()
    with _locked(directory):
        live = {name: record for name, record in _reconciled(directory, read_jobs(directory)).items() if _live(record)}
        # first where they are: a record says that a job is cancelled only once it is
        queue.cancel(
            record.scheduler_id for record in live.values() if record.engine == "slurm" and record.scheduler_id
        )
        if any(record.engine == "local" for record in live.values()):
            local.cancel(directory)
        for name in live:
            update_record(directory, name, _cancelled)
    return len(live)


def _write(sweep: SweepFile, cells: Sequence[Cell], directory: Path) -> list[Job]:
    """The sweep's files: studies, cells, jobs."""
    freeze(cells, directory)
    jobs, records = _planned(sweep, cells, directory)
    for name, record in records.items():
        if record != Record():
            update_record(directory, name, lambda before, record=record: record if before == Record() else before)
    write_jobs(jobs, directory)
    write_text(directory / SWEEP_FILE, sweep_yaml(sweep))
    return jobs


def _planned(sweep: SweepFile, cells: Sequence[Cell], directory: Path) -> tuple[list[Job], dict[str, Record]]:
    """The jobs, and their records, corrected by what their engines say; nothing is written."""
    earlier = read_jobs(directory)
    known = _corrected(directory, _as_written(directory, earlier))
    live = [name for name, record in known.items() if _live(record)]
    done = [name for name, record in known.items() if record.state == "done"]
    jobs = plan_jobs(cells, earlier, sweep.launcher.cells_per_job, live=live, done=done)
    for job in jobs:
        if job.name not in known:
            old = takes_over(job, earlier)
            known[job.name] = _taken_over(known[old.name], job) if old else Record()
    return jobs, {job.name: known[job.name] for job in jobs}


def _taken_over(record: Record, job: Job) -> Record:
    """What a smaller job has of the larger one before it: state and attempts, but nothing that a scheduler knows."""
    return replace(record, cells=job.cells, scheduler_id=None, host=None, pid=None)


def _hand_over(
    directory: Path,
    jobs: Sequence[Job],
    records: dict[str, Record],
    launcher: Launcher,
    foreground: bool,
) -> None:
    if launcher.engine == "slurm":
        try:
            from sae_transfer.sweep import slurm
        except ModuleNotFoundError as error:
            raise StudyError(
                f"launcher.engine: slurm needs {error.name}, which is not installed",
                "pip install 'sae-transfer[slurm]'",
            ) from error
        slurm.submit(directory, jobs, records, launcher)
        return
    if not foreground:
        # before there are jobs for it: those that nobody supervises are taken back by whoever looks
        local.start_supervisor(directory)
    local.submit(directory, jobs)


def _waiting_in_slurm_for(
    chosen: Sequence[Job], jobs: Sequence[Job], records: Mapping[str, Record]
) -> dict[str, Record]:
    """Jobs in SLURM's queue that need a job which is about to be submitted again; the report is seen to by itself."""
    names = {job.name for job in chosen}
    waiting: dict[str, Record] = {}
    for job in jobs:  # each after those it needs
        record = records[job.name]
        is_queued = record.state == "submitted" and record.engine == "slurm" and job.kind != "report"
        if is_queued and names.intersection(job.needs):
            waiting[job.name] = record
            names.add(job.name)
    return waiting


def _withdraw_report(directory: Path, records: dict[str, Record]) -> None:
    """A report that waits in SLURM's queue waits for too little once more jobs are submitted."""
    record = records[REPORT]
    if record.state in LIVE and record.engine == "slurm" and record.scheduler_id:
        queue.cancel([record.scheduler_id])
    records[REPORT] = update_record(directory, REPORT, lambda _: Record())


def _reconciled(directory: Path, jobs: Sequence[Job]) -> dict[str, Record]:
    """Records of all jobs, corrected by what their engines say, and kept so."""
    before = _as_written(directory, jobs)
    corrected = _corrected(directory, before)

    def correct(record: Record, name: str) -> Record:
        # a job that wrote its state since then knows better
        return corrected[name] if record == before[name] else record

    return before | {
        name: update_record(directory, name, lambda record, name=name: correct(record, name))
        for name, record in before.items()
        if _is_asked_after(record)
    }


def _corrected(directory: Path, before: Mapping[str, Record]) -> dict[str, Record]:
    """Records corrected by what their engines say."""
    asked = {name: record for name, record in before.items() if _is_asked_after(record)}
    facts = _facts_of_slurm(asked) | local.facts(
        directory, {name: record for name, record in asked.items() if record.engine == "local" and _live(record)}
    )
    return {**before, **{name: reconcile(record, facts.get(name)) for name, record in asked.items()}}


def _as_written(directory: Path, jobs: Sequence[Job]) -> dict[str, Record]:
    return {job.name: read_record(directory, job.name) for job in jobs}


def _facts_of_slurm(records: Mapping[str, Record]) -> dict[str, Fact]:
    numbers = {name: record.scheduler_id for name, record in records.items() if record.engine == "slurm"}
    try:
        known = queue.ask(number for number in numbers.values() if number)
    except StudyError:
        if any(_live(records[name]) for name in numbers):
            raise
        return {}  # where there is no SLURM, nothing can have been put back into its queue
    return {name: known[number] for name, number in numbers.items() if number in known}


def _duration(hours: float) -> str:
    for unit, each in (("h", 1), ("min", 60)):
        if hours * each >= 1:
            return f"{hours * each:,.1f} {unit}"
    return f"{hours * 3600:.1f} s"


def _is_asked_after(record: Record) -> bool:
    return _live(record) or record.state == "killed"  # which may be back in SLURM's queue


def _live(record: Record) -> bool:
    return record.state in LIVE


def _cancelled(record: Record) -> Record:
    """What waits is pending again; what runs writes its own end. An attempt that its user ended does not count."""
    if record.state == "submitted":
        return given_back(record, "cancelled")
    if record.state not in ("running", "killed"):
        return record  # it came to its own end first
    return replace(record, attempts=max(0, record.attempts - 1), message="cancelled")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        (directory / "jobs").mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / local.SWEEP_LOCK)
        lock.acquire(timeout=5)  # a supervisor that is about to end holds it for a moment
    except Timeout as error:
        raise StudyError(f"{directory}: another sweep command is at work here", "wait for it to end") from error
    except OSError as error:
        raise StudyError(f"{directory}: cannot be written ({error.strerror or error})", "another --out DIR") from error
    try:
        yield
    finally:
        lock.release()


def _require_sweep(directory: Path) -> None:
    if not is_sweep(directory):
        raise StudyError(
            f"{directory}: is no sweep's directory (it lacks {SWEEP_FILE}, jobs.json or cells.json)",
            "sae-transfer sweep SWEEP --out DIR",
        )


def _is_ours(directory: Path) -> bool:
    return is_sweep(directory) or (directory / local.SWEEP_LOCK).exists()
