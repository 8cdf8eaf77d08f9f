"""A study from its file to its report: resolve the pair, take the run directory, carry out stages in order."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from sae_transfer import signals
from sae_transfer.config import SIDES, Study
from sae_transfer.errors import StudyError, first_line, is_out_of_memory
from sae_transfer.models.pair import fingerprint, resolve_pair
from sae_transfer.saes.checkpoints import CHECKPOINTS, STATE_FILE
from sae_transfer.stages.context import Context
from sae_transfer.stages.evaluation import cross_eval, instruct, outliers, report, weights
from sae_transfer.stages.training import finetune, train
from sae_transfer.study import RunDirectory
from sae_transfer.tracking import open_tracker

logger = logging.getLogger(__name__)

_WORK: dict[str, Callable[[Context], None]] = {
    "tokens": lambda context: context.tokens(),
    "train": lambda context: train([context], context.study.train.models),
    "finetune": lambda context: finetune([context]),
    "cross-eval": cross_eval,
    "outliers": outliers,
    "instruct": instruct,
    "weights": weights,
    "report": report,
}
STAGES = tuple(_WORK)


def run_stages(
    study: Study,
    root: Path,
    stages: Sequence[str] = STAGES,
    *,
    force: bool = False,
    retry_lr: float | None = None,
) -> None:
    """Carry out stages of a study; tokens and norm scales are made for any stage that needs them.

    Args:
        study: The study.
        root: Its run directory.
        stages: Of `STAGES`, in that order.
        force: Redo a stage whose inputs changed; and the one stage asked for, when it is one, in any case.
        retry_lr: Peak learning rate with which trainings that have a checkpoint go on.

    Raises:
        StudyError: Something that the user can mend; finished stages stay finished.
    """
    _refuse_to_retry_nothing([root], retry_lr)
    redo = stages[0] if len(stages) == 1 else None
    with _opened(study, root, SIDES, force=force, redo=redo, retry_lr=retry_lr) as context:
        for stage in stages:
            signals.check()
            _WORK[stage](context)
        if len(stages) > 1:  # a single one has just said it
            context.say_rates()


def train_together(
    studies: Mapping[Path, Study],
    stage: str,
    *,
    side: str | None = None,
    force: bool = False,
    retry_lr: float | None = None,
) -> None:
    """Train, or fine-tune, the SAEs of one or several studies on one stream.

    Args:
        studies: Run directory -> study; they share models, site, token set and the settings of training.
        stage: `train` or `finetune`.
        side: Train the SAEs of this model only, `base` or `chat`; another process may train the other's.
        force: Do it again, also where the inputs changed.
        retry_lr: Peak learning rate with which trainings that have a checkpoint go on.

    Raises:
        StudyError: Something that the user can mend; SAEs that are finished stay.
    """
    _refuse_to_retry_nothing(studies, retry_lr)
    without = [root for root, study in studies.items() if side and side not in study.train.models]
    if without:
        raise StudyError(
            f"--model {side}: train.models of {without[0]} does not name it",
            f"--set 'train.models=[{side}]', or leave it",
        )
    locked = (side,) if side else SIDES
    with ExitStack() as stack:
        group = [
            stack.enter_context(_opened(study, root, locked, force=force, redo=stage, retry_lr=retry_lr))
            for root, study in studies.items()
        ]
        if stage == "finetune":
            finetune(group)
        else:
            sides = [side] if side else list(dict.fromkeys(s for study in studies.values() for s in study.train.models))
            train(group, sides)


@contextmanager
def _opened(
    study: Study, root: Path, sides: Sequence[str], *, force: bool, redo: str | None, retry_lr: float | None
) -> Iterator[Context]:
    """Resolve a study's pair, take its run directory, and start its tracking.

    Args:
        study: The study.
        root: Its run directory.
        sides: Of the run directory, to be locked.
        force: Do stages again whose inputs changed.
        redo: With `force`, the stage to be done again in any case.
        retry_lr: Peak learning rate with which trainings that have a checkpoint go on.

    Yields:
        What its stages share.
    """
    # Torch takes all cores it sees, also those that a job was not given.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores))
    # Steps of training alone use TF32; some containers switch it on for everything, by a variable that torch reads.
    torch.set_float32_matmul_precision("highest")
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
        RunDirectory.open(root, identity, sides) as run,
        _out_of_memory_said(),
        open_tracker(
            tracking.wandb,
            project=tracking.project,
            entity=tracking.entity,
            name=study.name,
            config=study.model_dump(mode="json"),
            directory=root,
            part=sides[0] if len(sides) == 1 else None,
        ) as tracker,
    ):
        found = {"identity": identity, "pair_differences": notes}
        redo = redo if force else None
        yield Context(
            study, run, checkpoints, fingerprints, device, tracker, found, force=force, redo=redo, retry_lr=retry_lr
        )


@contextmanager
def _out_of_memory_said() -> Iterator[None]:
    """Say of what no stage said it more exactly that memory did not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise StudyError(
            f"out of memory ({first_line(error)}); finished stages are kept, and checkpoints",
            "a device with more memory (sae-transfer check CONFIG says how much), or pair.dtype: bfloat16",
        ) from error


def _refuse_to_retry_nothing(roots: Iterable[Path], retry_lr: float | None) -> None:
    if retry_lr is None:
        return
    if not 0 < retry_lr <= 1:
        raise StudyError(f"--retry-lr: {retry_lr:g} is no learning rate", "a number above 0, such as 2e-5, at most 1")
    # a stored SAE has no checkpoints any more
    if not any(path for root in roots for path in root.glob(f"saes/*/{CHECKPOINTS}/*/{STATE_FILE}")):
        raise StudyError(
            f"--retry-lr {retry_lr:g}: no training in {', '.join(map(str, roots))} has a checkpoint to retry from",
            "leave out --retry-lr; to train anew with another learning rate, --set train.lr=X and --force",
        )


def choose_device(asked: str) -> str:
    """The torch device that `auto` means here, or the one asked for.

    Raises:
        StudyError: It is not there.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = asked.partition(":")
    if kind == "cuda" and (not torch.cuda.is_available() or (index and int(index) >= torch.cuda.device_count())):
        raise StudyError(
            f"compute.device: {asked} is asked for, and this machine has no such device",
            "--device cpu, or --device auto",
        )
    return asked
