"""A study from its file to its report: resolve the pair, take the run directory, carry out stages in order."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_transfer.config import Study
from sae_transfer.errors import StudyError
from sae_transfer.models.pair import fingerprint, resolve_pair
from sae_transfer.stages import Stages
from sae_transfer.study import RunDirectory
from sae_transfer.tracking import open_tracker

logger = logging.getLogger(__name__)

STAGES = ("tokens", "train", "finetune", "cross-eval", "outliers", "instruct", "weights", "report")


def run_stages(study: Study, root: Path, stages: Sequence[str] = STAGES, *, force: bool = False) -> None:
    """Carry out stages of a study; tokens and norm scales are made for any stage that needs them.

    Args:
        study: The study.
        root: Its run directory.
        stages: Of `STAGES`, in that order.
        force: Redo a stage whose inputs changed; and the one stage asked for, when it is one, in any case.

    Raises:
        StudyError: Something that the user can mend; finished stages stay finished.
    """
    # Torch takes all cores it sees, also those that a job was not given.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    device = choose_device(study.compute.device)
    pair = study.pair
    checkpoints, notes = resolve_pair(
        (pair.base, pair.chat), (pair.base_revision, pair.chat_revision), study.site.hook_name
    )
    if notes:
        logger.warning("the two models differ in ways that leave activations comparable: %s", "; ".join(notes))
    fingerprints = {side: fingerprint(checkpoint) for side, checkpoint in checkpoints.items()}
    identity = {f"{side} model": value for side, value in fingerprints.items()} | {"site": study.site.hook_name}
    revisions = {f"{side}_revision": checkpoint.revision for side, checkpoint in checkpoints.items()}
    study = study.model_copy(update={"pair": pair.model_copy(update=revisions)})
    tracking = study.tracking
    with (
        RunDirectory.open(root, identity) as run,
        open_tracker(
            tracking.wandb,
            project=tracking.project,
            entity=tracking.entity,
            name=study.name,
            config=study.model_dump(mode="json"),
            directory=root,
        ) as tracker,
    ):
        redo = stages[0] if force and len(stages) == 1 else None
        found = {"identity": identity, "pair_differences": notes}
        work = Stages(study, run, checkpoints, fingerprints, device, tracker, found, force=force, redo=redo)
        for stage in stages:
            getattr(work, stage.replace("-", "_"))()


def choose_device(asked: str) -> str:
    """The torch device that `auto` means here, or the one asked for.

    Raises:
        StudyError: It is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return "cuda" if available["cuda"] else "cpu"
    kind, _, index = asked.partition(":")
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise StudyError(
            f"compute.device: {asked} is asked for, and this machine has no such device",
            "--device cpu, or --device auto",
        )
    return asked
