"""Train SAEs with SAELens's `SAETrainer`, several on one activation stream; fine-tuning starts it from an SAE."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_transfer import signals
from sae_transfer.errors import StudyError, first_line, is_out_of_memory
from sae_transfer.progress import Meter
from sae_transfer.saes.checkpoints import KEPT, Checkpoint, Checkpoints, common_starts
from sae_transfer.saes.curve import LOG_FILE, TOLD_FILE, CurveLog
from sae_transfer.saes.store import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE, is_finite, load_own, save_trained
from sae_transfer.saes.stream import ActivationStream
from sae_transfer.saes.trainer import FastTrainer, StepOutput
from sae_transfer.study import clear_scratch, read_json
from sae_transfer.throughput import CHECKPOINT

logger = logging.getLogger(__name__)

LOG_POINTS = 500  # of a training curve, at most
COSTLY_CHECKPOINTS = 0.02  # share of the time
EXPLODED = 100  # times the mean squared norm of a batch: an SAE that puts out nothing has an MSE of 1 of them
# SAELens's moving average of the batchtopk threshold forgets its start at rate 0.01: e^-4 of it is left after this.
BATCHTOPK_SETTLED_STEPS = 400
# Warm-up of the sparsity coefficient has another name in each architecture; top-k ones have none.
SPARSITY_WARMUP_KEYS = {"standard": "l1_warm_up_steps", "gated": "l1_warm_up_steps", "jumprelu": "l0_warm_up_steps"}

_SEEDING = threading.Lock()  # the random state that SAELens draws from is the process's, and trainings run in threads


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
        identity: Label -> JSON value, everything that its numbers depend on, and nothing of its siblings on the stream:
            checkpoints of another identity are refused, and an SAE stored with this one is not trained again.
        on_log: Told the SAE's id and each entry of its training curve, once, also over several processes.
    """

    directory: Path
    sae: TrainingSAE[Any]
    provenance: Mapping[str, Any]
    identity: Mapping[str, Any]
    on_log: Callable[[str, Mapping[str, Any]], None] = lambda sae, entry: None


class Diverged(StudyError):
    """The training of some SAEs blew up; the others of the stream are trained and stored.

    Attributes:
        directories: Of the SAEs that are not.
    """

    def __init__(self, problem: str, remedy: str, directories: Sequence[Path]) -> None:
        super().__init__(problem, remedy)
        self.directories = tuple(directories)


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
    with (
        _SEEDING,
        torch.random.fork_rng(devices=[]),
    ):  # drawn on the CPU, so that every device starts from the same weights
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
    checkpoint_every_min: float,
    on_accepted: Callable[[], None] = lambda: None,
    retry_lr: float | None = None,
    force: bool = False,
) -> None:
    """Train all on every batch of the stream, fold the factor in, and store them.

    What was cut goes on from its checkpoints, on a CPU bit for bit, and an SAE that is stored already is left as it is.
    SAEs that have no checkpoint at the same step are trained one group after the other. An SAE's directory is complete
    only when its provenance is there; then its checkpoints are gone.

    Args:
        trainees: SAEs in scaled space.
        stream: Scaled activations.
        schedule: Of the learning rate.
        norm_scale: c of the model, folded into each SAE at the end.
        autocast: bfloat16 for the forward pass of the SAEs.
        device: Where SAEs and stream are.
        label: For the progress line.
        checkpoint_every_min: Minutes, wall clock, between checkpoints; one is written as well when asked to stop.
        on_accepted: Called once nothing that is stored belongs to another training, before any training goes on.
        retry_lr: Peak learning rate for those that go on from a checkpoint, from there on.
        force: Train anew what was begun or stored under another identity, instead of refusing.

    Raises:
        Diverged: Losses of some SAEs exploded or were not finite.
        StudyError: Memory did not suffice, files cannot be written, or belong to another training.
        Stopped: Asked to stop; the checkpoints are written.
    """
    todo = [_Training(trainee) for trainee in trainees]
    todo = [training for training in todo if not training.is_stored(force)]
    starts = common_starts([training.checkpoints for training in todo]) if todo else []
    on_accepted()
    steps = [start.step if start else 0 for start in starts]
    failed: list[_Training] = []
    try:
        for step in sorted(set(steps)):
            group = [training for training, own in zip(todo, steps, strict=True) if own == step]
            for training in group:
                sae, start = training.trainee.sae, starts[todo.index(training)]
                trainer = _trainer(sae, schedule, stream.n_batches, stream.batch_size, autocast, device)
                training.begin(trainer, start, retry_lr)
            with signals.deferred():
                alive = _train_group(group, stream, step, label, checkpoint_every_min)
                for training in alive:
                    training.store(norm_scale, stream.n_batches, stream.batch_size)
            failed += [training for training in group if training not in alive]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise StudyError(
            f"{label}: out of memory ({first_line(error)}); checkpoints are kept",
            "lower train.batch_size (finetune.batch_size), or have fewer SAEs share a stream: widths in studies"
            " of their own, launcher.cells_per_job in a sweep",
        ) from error
    if failed:
        stored = "" if len(failed) == len(trainees) else "; the other SAEs are stored"
        raise Diverged(
            "\n".join(training.failure for training in failed) + stored,
            f"--retry-lr {failed[0].peak_lr / 2:g} to go on from the checkpoint with a lower learning rate; where there"
            " is none, lower train.lr, or leave out extreme activations (train.drop_norm_above: 10)",
            [training.trainee.directory for training in failed],
        )


def is_trained(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether an SAE of this very training is stored.

    Args:
        directory: `saes/<id>`.
        identity: As in `Trainee`.
    """
    stored = read_json(directory / PROVENANCE_FILE).get("identity")
    files = (directory / WEIGHTS_FILE, directory / CONFIG_FILE)
    return stored == Checkpoints(directory, identity).identity and all(file.exists() for file in files)


def discard_sae(directory: Path) -> None:
    """Have an SAE trained anew, whatever is there: it counts no longer as stored, and its checkpoints go.

    Args:
        directory: `saes/<id>`.
    """
    (directory / PROVENANCE_FILE).unlink(missing_ok=True)
    for name in (LOG_FILE, TOLD_FILE):  # a new curve, none of which has been told to anyone
        (directory / name).unlink(missing_ok=True)
    Checkpoints(directory, {}).remove_all()


class _Training:
    """One SAE while it is trained: its trainer, curve and checkpoints, and whether it blew up."""

    trainer: FastTrainer
    output: StepOutput

    def __init__(self, trainee: Trainee) -> None:
        self.trainee = trainee
        self.name = trainee.directory.name
        self.checkpoints = Checkpoints(trainee.directory, trainee.identity)
        self.failure = ""
        self._lr_changes: tuple[Mapping[str, float], ...] = ()
        self._health: list[Tensor] = []  # loss and relative error of the steps not yet looked at

    @property
    def peak_lr(self) -> float:
        return self.trainer.optimizer.param_groups[0]["initial_lr"]

    def is_stored(self, force: bool) -> bool:
        """Whether the SAE of this very training is there already."""
        directory = self.trainee.directory
        stored = read_json(directory / PROVENANCE_FILE).get("identity")
        if force:
            self.checkpoints.remove_other()
        elif stored is not None:
            self.checkpoints.refuse_other(stored, directory)
        if not is_trained(directory, self.trainee.identity):
            return False
        logger.info("%s: trained already", self.name)
        self.checkpoints.remove_all()
        (directory / TOLD_FILE).unlink(missing_ok=True)
        return True

    def begin(self, trainer: FastTrainer, start: Checkpoint | None, retry_lr: float | None) -> None:
        """Go on from a checkpoint, or start."""
        self.trainer = trainer
        directory = self.trainee.directory
        (directory / PROVENANCE_FILE).unlink(missing_ok=True)
        clear_scratch(directory)
        self.checkpoints.tidy(start.step if start else 0)
        if start is None:
            self.curve = CurveLog(directory / LOG_FILE, 0)
            return
        new_lr = None if retry_lr == start.lr else retry_lr
        # first: a checkpoint that has its new learning rate no longer says that another curve begins
        self.curve = CurveLog(directory / LOG_FILE, start.n_log_entries, is_new=new_lr is not None)
        if new_lr is not None:
            start = start.with_lr(new_lr)
        start.restore(trainer)
        self._lr_changes = start.lr_changes
        changed = f", with learning rate {self.peak_lr:g}" if self._lr_changes else ""
        logger.info("%s: going on from the checkpoint of step %s%s", self.name, f"{start.step:,}", changed)

    def step(self, batch: Float[Tensor, "tok d_model"], power: Float[Tensor, ""]) -> None:
        self.output = _step(self.trainer, batch)
        error = self.output.losses["mse_loss"] / power
        self._health.append(torch.stack([self.output.loss, error]))

    def is_sound(self, *, with_weights: bool) -> bool:
        """Whether no step since the last call blew up, nor the weights if asked; else `failure` says which."""
        done = self.trainer.n_training_steps
        what, at = "", done - 1
        if self._health:
            losses, errors = torch.stack(self._health).cpu().T
            bad = torch.nonzero(~torch.isfinite(losses) | (errors > EXPLODED)).flatten().tolist()
            if bad and math.isfinite(losses[bad[0]]):
                what = f"the MSE is {errors[bad[0]]:.3g} times the activations' mean squared norm"
            elif bad:
                what = f"the loss is {losses[bad[0]].item()}"
            at = done - len(losses) + bad[0] if bad else at
            self._health.clear()
        if not what and with_weights and not is_finite(self.trainee.sae):
            what = "the weights are no longer finite after the step"
        if not what:
            return True
        # a checkpoint that no good batch followed is not known to be good
        self.checkpoints.remove([step for step in self.checkpoints.steps() if step >= at])
        steps = self.checkpoints.steps()
        kept = f"its checkpoint of step {steps[0]:,} is kept" if steps else "it has no checkpoint yet"
        self.failure = f"training {self.name}: {what} at batch {at}; nothing was stored of it, {kept}"
        logger.error("%s", self.failure)
        return False

    def save(self) -> None:
        self.curve.flush()
        self.checkpoints.save(self.trainer, self.curve.n_entries, self._lr_changes)

    def store(self, norm_scale: float, n_steps: int, batch_size: int) -> None:
        """Fold and write the SAE; its checkpoints have served."""
        self.curve.flush()
        self.trainer.set_final_sae_metadata()
        provenance = {
            **self.trainee.provenance,
            "tokens": n_steps * batch_size,
            "steps": n_steps,
            "lr_changes": list(self._lr_changes),
            "identity": self.checkpoints.identity,
        }
        save_trained(self.trainee.sae, norm_scale, self.trainee.directory, provenance)
        self.checkpoints.remove_all()
        self.curve.close()


def _train_group(
    group: Sequence[_Training],
    stream: ActivationStream,
    start: int,
    label: str,
    checkpoint_every_min: float,
) -> list[_Training]:
    """Train SAEs that are at the same step to the end of the stream; those that did not blow up come back."""
    n_steps, batch_size = stream.n_batches, stream.batch_size
    log_every = max(1, n_steps // LOG_POINTS)
    meter = Meter(label, n_steps * batch_size, "tokens")
    alive, step, saved_step, saved_at = list(group), start, start, time.monotonic()
    has_warned = False
    try:
        for batch in stream.batches(start):
            signals.check()
            power = batch.square().sum(-1).mean().clamp_min(torch.finfo(batch.dtype).tiny)
            for training in alive:
                training.step(batch, power)
            step += 1
            is_logged = step % log_every == 0 or step == n_steps
            is_due = step < n_steps and time.monotonic() - saved_at >= 60 * checkpoint_every_min
            if is_logged or is_due:  # looking waits for the device, so it is not done at every step
                is_kept = is_due or step == n_steps
                alive = [training for training in alive if training.is_sound(with_weights=is_kept)]
            if not alive:
                break
            if is_logged:
                figures = [_figures(training.trainer, training.output) for training in alive]
                for training, values in zip(alive, figures, strict=True):
                    entry = {"step": step, "tokens": step * batch_size, **values}
                    if training.curve.add(entry):
                        training.trainee.on_log(training.name, entry)
                meter.update(step * batch_size, _shown(figures))
            if is_due:
                began = time.monotonic()
                with stream.throughput.timing(CHECKPOINT, (step - saved_step) * batch_size):
                    saved_step = step if _save(alive, label, step) else saved_step
                saved_at = time.monotonic()
                has_warned = has_warned or _warn_if_costly(saved_at - began, 60 * checkpoint_every_min)
    except signals.Stopped:
        if step > saved_step:
            _save([training for training in alive if training.is_sound(with_weights=True)], label, step)
        raise
    return alive


def _warn_if_costly(seconds: float, interval: float) -> bool:
    """Say it when a checkpoint of so many seconds, `interval` seconds apart, costs too much; whether it was said."""
    share = seconds / (seconds + interval)
    if share > COSTLY_CHECKPOINTS:
        logger.warning(
            "a checkpoint took %.1f s, and checkpoints so often %.0f%% of the time; a faster disk, or"
            " compute.checkpoint_every_min: %.2g, would make that less than 2%%",
            seconds,
            100 * share,
            seconds / COSTLY_CHECKPOINTS / 60,
        )
    return share > COSTLY_CHECKPOINTS


def _save(alive: Sequence[_Training], label: str, step: int) -> bool:
    """Checkpoint all or none; a disk that is full must not end a training that goes well."""
    if not alive:
        return False
    try:
        for training in alive:
            training.save()
    except StudyError as error:
        for training in alive:
            training.checkpoints.remove([step])
        left = alive[0].checkpoints.steps()
        newest = f"the newest is that of step {left[0]:,}" if left else "there is none yet"
        logger.error("%s: no checkpoint at step %s, %s; %s", label, f"{step:,}", newest, error)
        return False
    for training in alive:
        training.checkpoints.remove(training.checkpoints.steps()[KEPT:])
    logger.info("%s: checkpoint at step %s", label, f"{step:,}")
    return True


def _trainer(
    sae: TrainingSAE[Any], schedule: Schedule, n_steps: int, batch_size: int, autocast: bool, device: str
) -> FastTrainer:
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
    return FastTrainer(config, sae)


def _step(trainer: FastTrainer, batch: Float[Tensor, "tok d_model"]) -> StepOutput:
    sae = trainer.sae
    is_first_threshold = isinstance(sae, BatchTopKTrainingSAE) and not bool(sae.topk_threshold)
    trainer.maybe_reset_sparsity()
    output = trainer.step(batch)
    if is_first_threshold:
        # the moving average would start at zero; it starts at the first batch's threshold instead
        sae.topk_threshold = sae.topk_threshold / sae.cfg.topk_threshold_lr
    trainer.n_training_steps += 1
    return output


def _figures(trainer: FastTrainer, output: StepOutput) -> dict[str, float | None]:
    """A training-curve entry: losses as SAELens names them, L0, EV of the batch, dead features, lr; None: undefined."""
    unexplained = (output.sae_in - output.sae_out).square().sum()
    variance = (output.sae_in - output.sae_in.mean(0)).square().sum()
    values = {
        "loss": output.loss.item(),
        **{name: loss.item() for name, loss in output.losses.items()},
        "l0": output.l0.item(),
        "explained_variance": (1 - unexplained / variance).item(),
        "dead_features": trainer.dead_neurons.sum().item(),
        "lr": trainer.optimizer.param_groups[0]["lr"],
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
