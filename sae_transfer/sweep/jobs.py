"""The job graph: cells that can share a stream train together; then each is evaluated by itself; then one report."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sae_transfer.config import Study
from sae_transfer.errors import StudyError
from sae_transfer.study import digest, write_json
from sae_transfer.sweep.cells import Cell, cell_directory, slug

Kind = Literal["train-base", "train-chat", "finetune", "evaluate", "report"]
REPORT = "report"


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: Directory-safe, unique in the sweep.
        kind: What it does.
        cells: Ids of the cells that it does it for.
        needs: Names of the jobs that have to end before it starts.
        stages: Stages whose records say, in each cell's run directory, how far it is.
    """

    name: str
    kind: Kind
    cells: tuple[str, ...]
    needs: tuple[str, ...]
    stages: tuple[str, ...]

    def command(self, directory: Path, cells: Iterable[str]) -> list[str]:
        """What follows `sae-transfer`, for some of the job's cells.

        Args:
            directory: Of the sweep.
            cells: Those that are to be worked on.

        Returns:
            Arguments, with absolute paths.
        """
        if self.kind == "report":
            return ["report", str(directory.absolute())]
        studies = [str(cell_directory(directory.absolute(), cell) / "study.yaml") for cell in cells]
        if self.kind == "evaluate":
            return ["run", *studies, "--here", *(word for stage in self.stages for word in ("--stage", stage))]
        if self.kind == "finetune":
            return ["finetune", *studies, "--here"]
        return ["train", *studies, "--here", "--model", self.kind.removeprefix("train-")]


def plan_jobs(
    cells: Sequence[Cell],
    earlier: Sequence[Job] = (),
    cells_per_job: int | None = None,
    *,
    live: Collection[str] = (),
    done: Collection[str] = (),
) -> list[Job]:
    """The jobs of a sweep. Those of earlier cells stay as they were; new cells get jobs of their own.

    But where more cells share a stream than now may, and their training is neither done nor live, they get smaller
    jobs: what they have done stands in their own directories.

    Args:
        cells: All cells asked for.
        earlier: The jobs planned before.
        cells_per_job: How many cells may train on one stream; None: all that can.
        live: Names of jobs that are submitted or run.
        done: Names of jobs that are done.

    Returns:
        All jobs, each after those it needs; the report last.
    """
    parted = _to_part(earlier, cells_per_job, live, done) if cells_per_job else set[str]()
    jobs = [job for job in earlier if job.kind != "report" and not parted.intersection(job.cells)]
    known = {cell for job in jobs for cell in job.cells}
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.id not in known:
            groups[_shared(cell.study)].append(cell)
    for members in groups.values():
        each = cells_per_job or len(members)
        for start in range(0, len(members), each):
            jobs += _jobs_of(members[start : start + each])
    needs = tuple(job.name for job in jobs if job.kind == "evaluate")
    return [*jobs, Job(REPORT, "report", tuple(cell.id for cell in cells), needs, ())]


def takes_over(job: Job, earlier: Sequence[Job]) -> Job | None:
    """The larger job of before whose cells a job has a part of; None where it has none."""
    return next((old for old in earlier if old.kind == job.kind and set(job.cells) < set(old.cells)), None)


def _to_part(earlier: Sequence[Job], cells_per_job: int, live: Collection[str], done: Collection[str]) -> set[str]:
    """Cells that train with too many others: of groups that have a job which is not done, and none that is live."""
    busy = {cell for job in earlier if job.name in live and job.kind != "report" for cell in job.cells}
    large = [job for job in earlier if job.kind != "report" and len(job.cells) > cells_per_job]
    return {cell for job in large if job.name not in done and not busy.intersection(job.cells) for cell in job.cells}


def write_jobs(jobs: Sequence[Job], directory: Path) -> None:
    """Keep the graph in `DIR/jobs.json`."""
    write_json(directory / "jobs.json", [asdict(job) for job in jobs])


def read_jobs(directory: Path) -> list[Job]:
    """The graph as last written; none before the first sweep.

    Raises:
        StudyError: The file is damaged.
    """
    path = directory / "jobs.json"
    if not path.exists():
        return []
    try:
        jobs = [
            Job(job["name"], job["kind"], *(tuple(job[key]) for key in ("cells", "needs", "stages")))
            for job in json.loads(path.read_text(encoding="utf-8"))
        ]
        by_name = {job.name: job for job in jobs}
        is_whole = REPORT in by_name and all(need in by_name for job in jobs for need in job.needs)
    except (ValueError, KeyError, TypeError):
        is_whole, jobs = False, []
    if not is_whole:
        raise StudyError(f"{path}: is damaged", "another --out DIR, or put the file back as it was")
    return jobs


def _jobs_of(members: Sequence[Cell]) -> list[Job]:
    study, ids = members[0].study, tuple(cell.id for cell in members)
    mark = f"{slug(members[0].of, 40)}-layer{study.site.layer}-{digest(sorted(ids))[:6]}"
    needs: tuple[str, ...] = ()
    jobs = []
    if study.saes is not None:
        for side in study.train.models:
            kind: Kind = "train-base" if side == "base" else "train-chat"
            jobs.append(Job(f"{kind}-{mark}", kind, ids, (), (kind,)))
        needs = tuple(job.name for job in jobs)
        if study.finetune is not None:
            jobs.append(Job(f"finetune-{mark}", "finetune", ids, needs, ("finetune",)))
            needs = (*needs, f"finetune-{mark}")
    for cell in members:
        stages = ("cross-eval", "outliers", *(("instruct",) if cell.study.instruct else ()), "weights", "report")
        jobs.append(Job(f"evaluate-{cell.id}", "evaluate", (cell.id,), needs, stages))
    return jobs


def _shared(study: Study) -> str:
    """Equal for studies whose SAEs can train on one stream: the same models, site, tokens, batches and schedules."""
    tune = study.finetune
    tuned: dict[str, Any] | None = None
    if tune is not None:
        instruct = study.instruct.model_dump(mode="json") if study.instruct and tune.data == "rollouts" else None
        tuned = {**tune.model_dump(mode="json", exclude={"control"}), "instruct": instruct}
    return digest(
        {
            **study.model_dump(mode="json", include={"pair", "site", "tokens", "norm_scale", "compute", "train"}),
            "trains": study.saes is not None,
            "held out": study.evaluate.tokens,
            "finetune": tuned,
            "training tokens": study.n_training_tokens,
        }
    )
