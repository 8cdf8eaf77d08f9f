"""What SLURM says of jobs: squeue, and sacct where there is one. Both may know a job, or neither."""

import logging
import subprocess
from collections.abc import Iterable

from sae_transfer.errors import StudyError
from sae_transfer.sweep.states import Fact, State

logger = logging.getLogger(__name__)

WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNS = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"}
TIMED_OUT = {"TIMEOUT", "DEADLINE"}
# A job that completed in SLURM's eyes and did not write its own end was ended by something, as one that failed.
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
}


def ask(ids: Iterable[str]) -> dict[str, Fact]:
    """Ask SLURM for jobs.

    Args:
        ids: Of jobs and array tasks, `123` and `123_4`.

    Returns:
        A fact for each job that it knows.

    Raises:
        StudyError: squeue does not answer.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    found = parse(_run(["squeue", "--noheader", "--array", "--all", "--states=all", "--me", "--format=%i|%T|%r"]))
    facts = {job: fact for job, fact in found.items() if job in wanted}
    if missing := wanted - set(facts):
        facts |= {job: fact for job, fact in _accounted(missing).items() if job in missing}
    return facts


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are ignored."""
    if known := sorted(set(ids)):
        _run(["scancel", "--quiet", *known])


def is_running(job: str) -> bool:
    """Whether a job runs and nobody has ended it: one that was cancelled is completing."""
    return _run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip() == "RUNNING"


def requeue(job: str) -> None:
    """Put a running job back into the queue, which ends its processes."""
    _run(["scontrol", "requeue", job])


def parse(listing: str) -> dict[str, Fact]:
    """Read lines `id|STATE|reason` of squeue or sacct; a state may be followed by words, `CANCELLED by 0`."""
    facts = {}
    for line in filter(None, map(str.strip, listing.splitlines())):
        job, state, *reason = line.split("|")
        name = state.split()[0].rstrip("+") if state.split() else ""
        said = f"SLURM says {name}" + (f" ({reason[0]})" if reason and reason[0] not in ("", "None") else "")
        became = _became(name)
        if became is not None:
            facts[job] = Fact(became, said)
    return facts


def _became(state: str) -> State | None:
    if state in WAITS:
        return "submitted"
    if state in RUNS:
        return "running"
    if state in TIMED_OUT:
        return "timeout"
    return "killed" if state in ENDED else None


def _accounted(ids: set[str]) -> dict[str, Fact]:
    """What sacct knows; nothing where there is no accounting."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(ids)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse(answer.stdout) if answer.returncode == 0 else {}


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except FileNotFoundError as error:
        raise StudyError(
            f"{command[0]} is not there; the engine slurm needs SLURM's commands",
            "run this on a login node, or set launcher.engine: local",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise StudyError(f"{command[0]} did not answer in two minutes", "try again later") from error
    except subprocess.CalledProcessError as error:
        raise StudyError(f"{command[0]}: {error.stderr.strip() or error}", "ask SLURM: sinfo") from error
