"""What each job of a sweep will cost, from the same counts as `sae-transfer check`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sae_transfer.config import Study
from sae_transfer.cost.device import Device
from sae_transfer.cost.estimate import REALISED, estimate
from sae_transfer.cost.shape import ModelShape, model_shape
from sae_transfer.sweep.jobs import Job

GIB = 2**30


@dataclass(frozen=True)
class JobCost:
    """Of one job.

    Attributes:
        memory_gib: On the device at once.
        hours: On the stated device, at the middle of what stages reach of its rates.
    """

    memory_gib: float
    hours: float


def job_costs(jobs: Sequence[Job], studies: Mapping[str, Study], device: Device, *, gpu: bool) -> dict[str, JobCost]:
    """Estimate every job but the report.

    Args:
        jobs: The jobs.
        studies: Of their cells, by id.
        device: What they run on.
        gpu: Whether that is a GPU.

    Returns:
        Costs by job.

    Raises:
        StudyError: A pair cannot be found or does not agree.
    """
    shapes: dict[tuple[object, object], ModelShape] = {}
    costs = {}
    for job in jobs:
        if job.kind == "report":
            continue
        together = [studies[cell] for cell in job.cells]
        key = (together[0].pair, together[0].site)
        if key not in shapes:
            shapes[key] = _shape(together[0])
        costs[job.name] = _job_cost(job, together, shapes[key], device, gpu=gpu)
    return costs


def _shape(study: Study) -> ModelShape:
    from sae_transfer.models.pair import resolve_pair  # brings torch

    pair = study.pair
    revisions = (pair.base_revision, pair.chat_revision)
    checkpoints, _ = resolve_pair((pair.base, pair.chat), revisions, study.site.hook_name, weights=False)
    return model_shape(checkpoints["base"].config)


def _job_cost(job: Job, studies: Sequence[Study], shape: ModelShape, device: Device, *, gpu: bool) -> JobCost:
    """Cells that train together cost what one study with the SAEs of all of them would."""
    groups = [group for study in studies for group in study.saes or ()]
    study = studies[0].model_copy(update={"saes": tuple(groups) or None})
    if job.kind in ("train-base", "train-chat"):
        side = job.kind.removeprefix("train-")
        study = study.model_copy(update={"train": study.train.model_copy(update={"models": (side,)})})
    names = {"evaluate": ("evaluation", "outliers"), "finetune": ("fine-tuning",)}.get(job.kind, ("training",))
    stages = [stage for stage in estimate(study, shape, gpu=gpu).stages if stage.name in names]
    most = max((stage.memory.total for stage in stages), default=0.0)
    return JobCost(most / GIB, sum(stage.hours(device) for stage in stages) / REALISED[1])
