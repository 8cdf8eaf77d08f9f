"""Checkpoints of one SAE's training: unfolded weights and SAELens's trainer state, checked by digests when read.

`saes/<id>/checkpoints/<step>/` is complete when it has its name. Saved between two steps, after the counters moved, it
continues on a CPU bit for bit.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from sae_transfer.errors import StudyError, first_line, is_out_of_memory
from sae_transfer.study import clear_scratch, digest, file_digest, read_json, replacing, sync, write_json

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
WEIGHTS_FILE, STATE_FILE = "weights.safetensors", "checkpoint.json"
KEPT = 2  # the newest, and the one before in case it is damaged


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written.

    Attributes:
        directory: `checkpoints/<step>`.
        step: Training steps done.
        n_log_entries: Entries of the training curve up to here.
        lr_changes: Every change of the peak learning rate, `{"step", "lr"}`, in order.
    """

    directory: Path
    step: int
    n_log_entries: int
    lr_changes: tuple[Mapping[str, float], ...]

    @property
    def lr(self) -> float | None:
        """The peak learning rate that it was changed to; None as long as it is the study's."""
        return self.lr_changes[-1]["lr"] if self.lr_changes else None

    def restore(self, trainer: SAETrainer[Any, Any]) -> None:
        """Put weights, optimizer, counters and schedules into a trainer that was made for the same training."""
        weights = load_file(self.directory / WEIGHTS_FILE, device=str(trainer.sae.device))
        trainer.sae.load_state_dict(weights)
        trainer.load_trainer_state(self.directory)  # torch.load with weights_only, its default
        if self.lr is not None:
            set_peak_lr(trainer, self.lr)

    def with_lr(self, lr: float) -> "Checkpoint":
        """The checkpoint, from now on continued with another peak learning rate; on disk as well."""
        changes = (*self.lr_changes, {"step": self.step, "lr": lr})
        path = self.directory / STATE_FILE
        state = {**read_json(path), "lr_changes": changes}
        write_json(path, _sealed(state))
        return Checkpoint(self.directory, self.step, self.n_log_entries, changes)


class Checkpoints:
    """The checkpoints of one SAE."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Describe them; nothing is read.

        Args:
            directory: `saes/<id>`.
            identity: Label -> JSON value, everything that this SAE's training depends on.
        """
        self._name = directory.name
        self._directory = directory / CHECKPOINTS
        self._identity = {label: digest(value) for label, value in identity.items()}

    @property
    def identity(self) -> dict[str, str]:
        """Digests of what the training depends on, by label."""
        return self._identity

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, good or damaged, newest first."""
        found = self._directory.iterdir() if self._directory.is_dir() else ()
        return sorted((int(path.name) for path in found if path.name.isdigit()), reverse=True)

    def save(
        self, trainer: SAETrainer[Any, Any], n_log_entries: int, lr_changes: Sequence[Mapping[str, float]]
    ) -> None:
        """Write the checkpoint of the step at which the trainer is.

        Args:
            trainer: Between two steps.
            n_log_entries: Entries of the training curve up to here.
            lr_changes: As in `Checkpoint`.

        Raises:
            StudyError: It cannot be written, or the disk is full.
        """
        step = trainer.n_training_steps
        with replacing(self._directory / str(step)) as directory:
            directory.mkdir()
            state = trainer.sae.state_dict()
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / WEIGHTS_FILE)
            with ThreadPoolExecutor() as pool:
                digests = {WEIGHTS_FILE: pool.submit(_synced_digest, directory / WEIGHTS_FILE)}
                try:
                    trainer.save_trainer_state(directory)
                except RuntimeError as error:  # torch says with it that it could not write
                    if is_out_of_memory(error):
                        raise
                    raise OSError(first_line(error)) from error
                for path in directory.iterdir():
                    if path.name not in digests:
                        digests[path.name] = pool.submit(_synced_digest, path)
                files = {name: each.result() for name, each in sorted(digests.items())}
            content = {
                "step": step,
                "identity": self._identity,
                "lr_changes": list(lr_changes),
                "n_log_entries": n_log_entries,
                "files": files,
            }
            write_json(directory / STATE_FILE, _sealed(content))

    def load(self, step: int) -> Checkpoint | None:
        """A checkpoint after its digests were checked.

        Args:
            step: Of `steps`.

        Returns:
            The checkpoint; None, with a warning, when it is damaged.

        Raises:
            StudyError: It belongs to another training.
        """
        directory = self._directory / str(step)
        state = read_json(directory / STATE_FILE)
        if state.get("sha256") != _sealed(state)["sha256"] or state["step"] != step:
            return self._warn(directory, STATE_FILE)
        self.refuse_other(state["identity"], directory)
        for name, expected in state["files"].items():
            if not (directory / name).is_file() or file_digest(directory / name) != expected:
                return self._warn(directory, name)
        return Checkpoint(directory, step, state["n_log_entries"], tuple(state["lr_changes"]))

    def refuse_other(self, identity: Mapping[str, str], path: Path) -> None:
        """Refuse what was written by another training.

        Args:
            identity: Digests by label that stand there.
            path: Where.

        Raises:
            StudyError: They differ from this training's.
        """
        differ = [
            label for label in sorted({*identity, *self._identity}) if identity.get(label) != self._identity.get(label)
        ]
        if differ:
            raise StudyError(
                f"{path}: belongs to another training; other than here: {', '.join(differ)}",
                "--force to train anew in its place, or --out DIR to keep both",
            )

    def remove(self, steps: Sequence[int]) -> None:
        """Remove the checkpoints of these steps."""
        for step in steps:
            shutil.rmtree(self._directory / str(step), ignore_errors=True)

    def remove_other(self) -> None:
        """Remove the checkpoints of other trainings."""
        states = {step: read_json(self._directory / str(step) / STATE_FILE) for step in self.steps()}
        self.remove([step for step, state in states.items() if state.get("identity") != self._identity])

    def remove_all(self) -> None:
        """Remove every checkpoint, and what a killed process left of one."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def tidy(self, newest: int) -> None:
        """Remove what a killed process left half-written, and checkpoints after the one that is continued from."""
        clear_scratch(self._directory)
        self.remove([step for step in self.steps() if step > newest])

    def _warn(self, directory: Path, name: str) -> None:
        logger.warning("%s: the checkpoint %s is damaged (%s) and passed over", self._name, directory, name)


def common_starts(each: Sequence[Checkpoints]) -> list[Checkpoint | None]:
    """Where each SAE goes on: at the newest step that all have; if there is none, each at its own newest.

    Args:
        each: The checkpoints of SAEs that are trained on one stream.

    Returns:
        A good checkpoint for each; None: from the start.

    Raises:
        StudyError: One belongs to another training.
    """
    left = [checkpoints.steps() for checkpoints in each]
    while shared := set.intersection(*map(set, left)):
        newest = max(shared)
        found = [checkpoints.load(newest) for checkpoints in each]
        if all(found):
            return found
        for steps, checkpoint in zip(left, found, strict=True):
            if checkpoint is None:
                steps.remove(newest)
    candidates = ((c.load(step) for step in steps) for c, steps in zip(each, left, strict=True))
    return [next((checkpoint for checkpoint in own if checkpoint), None) for own in candidates]


def set_peak_lr(trainer: SAETrainer[Any, Any], lr: float) -> None:
    """Go on with another peak learning rate; warm-up and decay keep their shape."""
    for group in trainer.optimizer.param_groups:
        group["lr"] *= lr / group["initial_lr"]
        group["initial_lr"] = lr
    sequence: Any = trainer.lr_scheduler
    for scheduler in sequence._schedulers:
        scheduler.base_lrs = [lr for _ in scheduler.base_lrs]


def _synced_digest(path: Path) -> str:
    """The digest of a file that is on the disk: files of gigabytes are flushed and read while the next is written."""
    sync(path)
    return file_digest(path)


def _sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its own digest, so that a flipped byte in it is noticed as well."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    return {**content, "sha256": digest(content)}
