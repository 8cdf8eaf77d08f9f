"""What a sweep file may say: which studies, which grid of settings, and how its jobs are launched."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from sae_transfer.config import Count, Positive, Several, Text, Whole
from sae_transfer.errors import StudyError
from sae_transfer.study_file import as_yaml, parse_other, read_mapping

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Options of sbatch that submitit needs, or that would write elsewhere.
OWN_SBATCH_OPTIONS = ("array", "chdir", "dependency", "error", "output", "signal", "time")


def _no_own_option(values: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(key for key in values if key in OWN_SBATCH_OPTIONS):
        expected = f"options that sae-transfer does not set itself, as it does {', '.join(taken)}"
        raise PydanticCustomError("study", "expected {expected}", {"expected": expected})
    return values


def _no_value_twice(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise PydanticCustomError("study", "expected {expected}", {"expected": "no value twice"})
    return values


class Launcher(BaseModel):
    """Where jobs run and what each asks for."""

    model_config = STRICT

    engine: Literal["slurm", "local"] = Field(
        default="local", description="slurm: batch jobs, through submitit; local: this machine, one job a slot."
    )
    partition: Text | None = Field(default=None, description="SLURM partition; null takes the cluster's default.")
    account: Text | None = Field(default=None, description="SLURM account; null takes yours.")
    gpus_per_job: Whole = Field(default=1, description="GPUs of a job on SLURM; 0 for CPU nodes.")
    cpus_per_job: Count = Field(default=8, description="Cores of a job on SLURM.")
    mem_gb: Positive | None = Field(default=64, description="Memory of a job on SLURM; null takes the default.")
    timeout_min: Count = Field(
        default=1440,
        description="Time limit of a job on SLURM. Below 10 minutes, submitit counts a preemption as a time-out.",
    )
    signal_delay_s: Count = Field(
        default=90,
        description="How long before its limit a job is told to write its checkpoints; they may take 70% of it.",
    )
    max_timeouts: Whole = Field(default=3, description="How often a job that reached its limit goes on by itself.")
    array_parallelism: Count = Field(default=8, description="Jobs of one array that run at once.")
    setup: tuple[Text, ...] = Field(default=(), description="Shell lines before each job, such as module load.")
    cells_per_job: Count | None = Field(
        default=None,
        description="Cells that may share a job, whose SAEs are then all on one GPU; null: all that share a stream.",
    )
    slurm: Annotated[dict[str, str | int | float | bool], AfterValidator(_no_own_option)] = Field(
        default={}, description="Any other option of sbatch, such as qos: normal."
    )
    slots: Count | None = Field(
        default=None, description="Jobs at once of the engine local; null: one a GPU, or one where there is none."
    )
    max_attempts: Count = Field(
        default=3,
        description="Submissions of a job that is killed, lost or timed out; then --retry-failed is needed.",
    )


class SweepFile(BaseModel):
    """A grid over one study or several."""

    model_config = STRICT

    study: Several[Text] = Field(description="A study file, or a list of them.")
    grid: dict[str, Annotated[tuple[Any, ...], AfterValidator(_no_value_twice), Field(min_length=1)]] = Field(
        default={}, description="Keys of a study and the values each takes; every combination is a cell."
    )
    launcher: Launcher = Field(default=Launcher(), description="How jobs are launched, or a YAML file that says it.")


def load_sweep(path: Path | str) -> SweepFile:
    """Read a sweep file; paths in it are looked up beside it, then in the working directory, and become absolute.

    Args:
        path: The YAML file.

    Returns:
        The sweep.

    Raises:
        StudyError: Everything wrong with it, a line each. What is wrong with its studies shows when it is expanded.
    """
    path = Path(path)
    raw, problems = read_mapping(path)
    beside, remedy = path.absolute().parent, f"mend this, then: sae-transfer sweep {path} --out DIR --dry-run"
    launcher = raw.get("launcher")
    if isinstance(launcher, str):
        found = _found(launcher, beside)
        content, faults = read_mapping(found)
        raw["launcher"] = parse_other(content, Launcher, str(found), faults, remedy).model_dump()
    raw = {key: value for key, value in raw.items() if value is not None}
    sweep = parse_other(raw, SweepFile, str(path), problems, remedy)
    return sweep.model_copy(update={"study": tuple(str(_found(text, beside)) for text in sweep.study)})


def read_launcher(path: Path) -> Launcher:
    """The launcher of a sweep file as `sweep_yaml` wrote it, wherever its studies are now."""
    raw, _ = read_mapping(path)
    return Launcher.model_validate(raw["launcher"])


def sweep_yaml(sweep: SweepFile) -> str:
    """The sweep as YAML with every default written out."""
    return f"# The sweep as last asked for, with all defaults.\n{as_yaml(sweep.model_dump(mode='json'))}"


def _found(text: str, beside: Path) -> Path:
    places = dict.fromkeys(os.path.abspath(place / os.path.expanduser(text)) for place in (beside, Path.cwd()))
    for place in places:
        if os.path.isfile(place):
            return Path(place)
    raise StudyError(f"{text}: expected a YAML file, found neither {' nor '.join(places)}")
