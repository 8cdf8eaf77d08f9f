"""What to change in a study that does not fit into a device's memory, found by estimating it again."""

from collections.abc import Iterator

from sae_transfer.config import SAESpec, Study
from sae_transfer.cost.device import GPUS, Device
from sae_transfer.cost.estimate import Stage, estimate, stream_memory
from sae_transfer.cost.shape import ModelShape

USABLE = 0.93  # of a device's memory; the rest is lost between blocks of an allocator
LEAST_BATCH = 256  # of a training step: smaller ones are slow, and noisy


def fits(stage: Stage, device: Device) -> bool:
    """Whether a stage's memory is there."""
    return stage.memory.total <= USABLE * device.gib * 2**30


def proposals(study: Study, shape: ModelShape, stage: Stage, device: Device, *, gpu: bool) -> Iterator[str]:
    """Changes of a study file after any one of which a stage fits, in words.

    Args:
        study: The study.
        shape: Of its models.
        stage: One that does not fit.
        device: Where.
        gpu: Whether that is a GPU.

    Yields:
        A change each; the last resort is another device.
    """
    section = {"training": "train", "fine-tuning": "finetune"}.get(stage.name, "evaluate")
    batch_size = getattr(study, section).batch_size
    least = 1 if section == "evaluate" else LEAST_BATCH
    while (batch_size := batch_size // 2) >= least:
        smaller = _again(_with_batch_size(study, section, batch_size), shape, stage, gpu=gpu)
        if fits(smaller, device):
            yield f"{section}.batch_size: {batch_size} ({smaller.memory.total / 2**30:,.1f} GiB)"
            break
    groups = _groups(study, shape, stage, device, gpu=gpu) if section != "evaluate" else []
    if len(groups) > 1:
        names = "; ".join(", ".join(spec.name for spec in group) for group in groups)
        yield f"saes in {len(groups)} studies of their own: {names}"
    if section == "evaluate" and study.pair.dtype != "bfloat16":
        coarser = study.model_copy(update={"pair": study.pair.model_copy(update={"dtype": "bfloat16"})})
        if fits(smaller := _again(coarser, shape, stage, gpu=gpu), device):
            yield f"pair.dtype: bfloat16, which changes numbers ({smaller.memory.total / 2**30:,.1f} GiB)"
    larger = sorted((gpu for gpu in GPUS if fits(stage, gpu)), key=lambda gpu: gpu.gib)
    if gpu and larger:
        yield f"a GPU of {larger[0].gib:g} GiB ({larger[0].name})"


def _again(study: Study, shape: ModelShape, stage: Stage, *, gpu: bool) -> Stage:
    found = estimate(study, shape, gpu=gpu).stage(stage.name)
    assert found is not None
    return found


def _with_batch_size(study: Study, section: str, batch_size: int) -> Study:
    changed = getattr(study, section).model_copy(update={"batch_size": batch_size})
    return study.model_copy(update={section: changed})


def _groups(study: Study, shape: ModelShape, stage: Stage, device: Device, *, gpu: bool) -> list[list[SAESpec]]:
    """The study's SAEs in groups that each fit on one stream, in the file's order; none if one SAE alone does not."""
    groups: list[list[SAESpec]] = []
    for spec in study.sae_specs():
        for group in ([*groups[-1], spec] if groups else [spec], [spec]):
            memory = stream_memory(study, shape, group, finetuning=stage.name == "fine-tuning", gpu=gpu)
            if memory.total <= USABLE * device.gib * 2**30:
                break
        else:
            return []
        if groups and len(group) > 1:
            groups[-1] = group
        else:
            groups.append(group)
    return groups
