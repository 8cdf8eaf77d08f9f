"""Train SAEs with SAELens's `SAETrainer`, several on one activation stream; fine-tuning starts it from an SAE."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import SAEMetadata, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_transfer.errors import StudyError
from sae_transfer.progress import Meter
from sae_transfer.saes.store import load_own, save_trained
from sae_transfer.saes.stream import ActivationStream

logger = logging.getLogger(__name__)

LOG_FILE = "train_log.jsonl"
LOG_POINTS = 500  # of a training curve, at most
# SAELens's moving average of the batchtopk threshold forgets its start at rate 0.01: e^-4 of it is left after this.
BATCHTOPK_SETTLED_STEPS = 400
# Warm-up of the sparsity coefficient has another name in each architecture; top-k ones have none.
SPARSITY_WARMUP_KEYS = {"standard": "l1_warm_up_steps", "gated": "l1_warm_up_steps", "jumprelu": "l0_warm_up_steps"}


@dataclass(frozen=True)
class Schedule:
    """Peak learning rate, and the fractions of all steps over which it rises from zero and falls to zero, linearly."""

    lr: float
    lr_warmup: float
    lr_decay: float


@dataclass(frozen=True)
class Trainee:
    """One SAE to be trained on the stream.

    Attributes:
        directory: `saes/<id>`; its name is the SAE's id.
        sae: In scaled space; trained in place.
        provenance: What provenance.json will say besides the factor and the training's figures.
        on_log: Told the SAE's id and each entry of its training curve.
    """

    directory: Path
    sae: TrainingSAE[Any]
    provenance: Mapping[str, Any]
    on_log: Callable[[str, Mapping[str, Any]], None] = lambda sae, entry: None


def new_sae(
    architecture: str,
    *,
    d_in: int,
    d_sae: int,
    sparsity_key: str,
    sparsity_value: float,
    seed: int,
    sparsity_warmup_steps: int,
    options: Mapping[str, Any],
    metadata: Mapping[str, Any],
    device: str,
) -> TrainingSAE[Any]:
    """A fresh SAE by SAELens's initialization: decoder norm 0.1, encoder its transpose, biases zero.

    Args:
        architecture: SAELens's name.
        d_in: Width of the site.
        d_sae: Number of features.
        sparsity_key: For example `l1_coefficient`.
        sparsity_value: Its value.
        seed: Of the weights; the global random state is left as it was.
        sparsity_warmup_steps: Linear warm-up of an L1 or L0 coefficient.
        options: Further fields of SAELens's training configuration.
        metadata: Kept in cfg.json (`model_name`, `hook_name`, ...).
        device: Where to.

    Returns:
        The SAE, float32.
    """
    sae_class, config_class = get_sae_training_class(architecture)
    warmup_key = SPARSITY_WARMUP_KEYS.get(architecture)
    warmup = {warmup_key: sparsity_warmup_steps} if warmup_key else {}
    value = int(sparsity_value) if sparsity_key == "k" and architecture == "topk" else sparsity_value
    config = config_class(
        d_in=d_in,
        d_sae=d_sae,
        normalize_activations="none",  # the stream is scaled, by a factor that must not get lost
        device="cpu",
        metadata=SAEMetadata(**metadata),
        **{sparsity_key: value, **warmup, **options},
    )
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU, so that every device starts from the same weights
        torch.manual_seed(seed)
        sae = sae_class(config)
    config.device = device
    return sae.to(device)


def continued_sae(directory: Path, fresh: TrainingSAE[Any]) -> TrainingSAE[Any]:
    """A stored SAE unfolded into the scaled space that it was trained in, ready to be trained on.

    Weights only: optimizer and counters start anew. A topk or batchtopk SAE is stored with the norms of its decoder
    moved into its encoder; it comes back as the same function in that form.

    Args:
        directory: `saes/<id>` of this run.
        fresh: An SAE of the same settings, whose weights are replaced.

    Returns:
        `fresh`.

    Raises:
        StudyError: The files are damaged.
    """
    stored = load_own(directory, str(fresh.device))
    assert stored.scale is not None  # own SAEs are always trained in scaled space
    state = dict(stored.sae.state_dict())
    if isinstance(fresh, BatchTopKTrainingSAE):
        state["topk_threshold"] = state.pop("threshold")[0].double()  # one threshold, saved once a feature
    fresh.load_state_dict(state)
    fresh.fold_activation_norm_scaling_factor(1 / stored.scale)
    return fresh


def train_saes(
    trainees: Sequence[Trainee],
    stream: ActivationStream,
    schedule: Schedule,
    *,
    norm_scale: float,
    autocast: bool,
    device: str,
    label: str,
) -> None:
    """Train all on every batch of the stream, fold the factor in, and store them.

    Writes `train_log.jsonl` as it goes, and an SAE's directory is complete only when its provenance is there.

    Args:
        trainees: SAEs in scaled space.
        stream: Scaled activations.
        schedule: Of the learning rate.
        norm_scale: c of the model, folded into each SAE at the end.
        autocast: bfloat16 for the forward pass of the SAEs.
        device: Where SAEs and stream are.
        label: For the progress line.

    Raises:
        StudyError: A loss is not finite; nothing of that training is stored as an SAE.
    """
    n_steps, batch_size = stream.n_batches, stream.batch_size
    trainers = [_trainer(t.sae, schedule, n_steps, batch_size, autocast, device) for t in trainees]
    every = max(1, n_steps // LOG_POINTS)
    meter = Meter(label, n_steps * batch_size, "tokens")
    started = time.monotonic()
    pending: list[Float[Tensor, "sae"]] = []  # noqa: UP037
    with ExitStack() as stack:
        logs = [_open_log(stack, trainee.directory) for trainee in trainees]
        for step, batch in enumerate(stream.batches()):
            outputs = [_step(trainer, batch) for trainer in trainers]
            pending.append(torch.stack([output.loss.detach() for output in outputs]))
            if (step + 1) % every and step + 1 != n_steps:
                continue
            _refuse_if_not_finite(torch.stack(pending), step, [t.directory.name for t in trainees])
            pending.clear()
            done = (step + 1) * batch_size
            rate = done / (time.monotonic() - started)
            figures = [_figures(tr, out) for tr, out in zip(trainers, outputs, strict=True)]
            for trainee, log, values in zip(trainees, logs, figures, strict=True):
                entry = {"step": step + 1, "tokens": done, **values, "tokens_per_s": round(rate)}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                trainee.on_log(trainee.directory.name, entry)
            meter.update(done, _shown(figures))
    for trainee, trainer in zip(trainees, trainers, strict=True):
        trainer.set_final_sae_metadata()
        provenance = {**trainee.provenance, "tokens": n_steps * batch_size, "steps": n_steps}
        save_trained(trainee.sae, norm_scale, trainee.directory, provenance)


def _trainer(
    sae: TrainingSAE[Any], schedule: Schedule, n_steps: int, batch_size: int, autocast: bool, device: str
) -> SAETrainer[Any, Any]:
    if isinstance(sae, BatchTopKTrainingSAE) and n_steps < BATCHTOPK_SETTLED_STEPS:
        logger.warning(
            "batchtopk: %d steps are few for its threshold, a moving average that settles in about %d; the saved SAE's"
            " L0 may be off its k",
            n_steps,
            BATCHTOPK_SETTLED_STEPS,
        )
    config = SAETrainerConfig(
        total_training_samples=n_steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=schedule.lr,
        lr_end=schedule.lr,  # not read by the constant schedule, but it must not be None
        lr_scheduler_name="constant",
        lr_warm_up_steps=round(schedule.lr_warmup * n_steps),
        lr_decay_steps=round(schedule.lr_decay * n_steps),
        device=device,
        autocast=autocast,
    )
    return SAETrainer(config, sae, iter(()))


def _step(trainer: SAETrainer[Any, Any], batch: Float[Tensor, "tok d_model"]) -> TrainStepOutput:
    sae = trainer.sae
    is_first_threshold = isinstance(sae, BatchTopKTrainingSAE) and not bool(sae.topk_threshold)
    trainer.maybe_reset_sparsity()
    output = trainer.step(batch)
    if is_first_threshold:
        # the moving average would start at zero; it starts at the first batch's threshold instead
        sae.topk_threshold = sae.topk_threshold / sae.cfg.topk_threshold_lr
    trainer.n_training_steps += 1
    return output


def _open_log(stack: ExitStack, directory: Path) -> TextIO:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return stack.enter_context((directory / LOG_FILE).open("w", encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{directory}: cannot be written ({error})", "check permissions, or use --out DIR") from error


def _refuse_if_not_finite(losses: Float[Tensor, "step sae"], step: int, names: Sequence[str]) -> None:
    bad = torch.nonzero(~torch.isfinite(losses))
    if len(bad):
        row, which = bad[0].tolist()
        at = step + 1 - len(losses) + row
        raise StudyError(
            f"training {names[which]}: the loss is {losses[row, which].item()} at batch {at}; nothing was stored",
            "lower train.lr, or leave out extreme activations (train.drop_norm_above: 10)",
        )


def _figures(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> dict[str, float | None]:
    """A training-curve entry: losses as SAELens names them, L0, EV of the batch, dead features, lr; None: undefined."""
    logged = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    losses = {k.removeprefix("losses/"): v for k, v in logged.items() if k.startswith("losses/")}
    values = {
        "loss": losses.pop("overall_loss"),
        **losses,
        "l0": logged["metrics/l0"],
        "explained_variance": logged["metrics/explained_variance"],
        "dead_features": logged["sparsity/dead_features"],
        "lr": logged["details/current_learning_rate"],
    }
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _shown(figures: Sequence[Mapping[str, float | None]]) -> str:
    """The figures of the first SAE, and of how many."""
    first = {key: float("nan") if value is None else value for key, value in figures[0].items()}
    text = (
        f"loss {first['loss']:.3g}, L0 {first['l0']:.1f}, EV {first['explained_variance']:.1%},"
        f" dead {first['dead_features']:.0f}"
    )
    return text if len(figures) == 1 else f"{text} (first of {len(figures)} SAEs)"
