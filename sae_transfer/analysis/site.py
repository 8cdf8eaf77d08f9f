"""Both models cut at the site, one in memory at a time, and their activations there. Shared by the stages."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sae_transfer.errors import StudyError
from sae_transfer.models.pair import Checkpoint
from sae_transfer.models.passes import AtOnce, in_passes
from sae_transfer.models.splice import Splicer
from sae_transfer.progress import Meter


@dataclass(frozen=True)
class SiteActivations:
    """What one model does at the site over the evaluation sequences.

    Attributes:
        acts: Raw activations `[seq pos d_model]`, float32, memory-mapped.
        norms: Their norms `[seq pos]`, float64.
    """

    acts: NDArray[np.float32]
    norms: NDArray[np.float64]

    @property
    def norm_scale(self) -> float:
        """c = sqrt(d_model) / mean ||x||, every position counted (Conerly et al., April 2024)."""
        return float(self.acts.shape[-1] ** 0.5 / self.norms.mean())


def collect_activations(
    splicer: Splicer,
    sequences: NDArray[np.integer],
    *,
    d_model: int,
    batch_size: int,
    device: str,
    path: Path,
    progress: Callable[[int], None],
) -> SiteActivations:
    """Run a model up to the site over all sequences, once, onto disk.

    Args:
        splicer: The model cut at the site.
        sequences: Token ids `[seq pos]`.
        d_model: Width of the site.
        batch_size: Most sequences a pass.
        device: Where the model is.
        path: A file for the activations, 4 bytes a value.
        progress: Told the number of sequences done.

    Returns:
        The activations and norms.

    Raises:
        StudyError: An activation is not finite, or memory runs out, also with half as much at once.
    """
    acts = np.lib.format.open_memmap(path, "w+", np.float32, (*sequences.shape, d_model))
    reserve(path)
    norms = np.empty(sequences.shape)

    def run(rows: slice, at_once: AtOnce) -> None:
        tokens = torch.from_numpy(sequences[rows].astype(np.int64)).to(device)
        batch = splicer.run_to(tokens).float()
        norms[rows] = batch.norm(dim=-1).double().cpu().numpy()
        acts[rows] = batch.cpu().numpy()

    in_passes(run, *sequences.shape, batch_size=batch_size, device=device, progress=progress)
    if not np.isfinite(norms).all():
        row, position = np.argwhere(~np.isfinite(norms))[0]
        raise StudyError(
            f"the activation at evaluation sequence {row}, position {position} is not finite",
            "evaluate in float32 (pair.dtype: float32)",
        )
    return SiteActivations(acts, norms)


def reserve(path: Path) -> None:
    """Take a memory-mapped file's space on disk now: a full disk would kill the process at the first write beyond it.

    Raises:
        StudyError: There is too little space.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise StudyError(
            f"{path.parent}: no space for {path.stat().st_size / 2**30:.2f} GiB of activations ({error.strerror})",
            "free some, choose another place with --out DIR, or lower evaluate.tokens",
        ) from error


class OneModelAtATime:
    """Splicers of the two models, of which one is in memory.

    Attributes:
        checkpoints: `base` and `chat`.
        device: Where the models are.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint], load: Callable[[str], Splicer], device: str) -> None:
        """Say which models; none is loaded yet.

        Args:
            checkpoints: `base` and `chat`.
            load: Side -> its model, cut at the site.
            device: Where it puts it.
        """
        self.checkpoints, self.device, self._load = checkpoints, device, load
        self._side: str | None = None
        self._splicer: Splicer | None = None

    def splicer(self, side: str) -> Splicer:
        """One side, loaded if the other one was; who keeps it and asks for the other has both in memory."""
        if self._splicer is None or self._side != side:
            self._splicer = None  # the old model's memory before the new one's
            self._splicer, self._side = self._load(side), side
        return self._splicer

    def collect(self, sequences: NDArray[np.integer], batch_size: int, directory: Path) -> dict[str, SiteActivations]:
        """Both models' activations over the sequences; the chat model is in memory afterwards.

        Args:
            sequences: Token ids `[seq pos]`.
            batch_size: Sequences a pass.
            directory: For the activations.

        Returns:
            Side -> activations.

        Raises:
            StudyError: A model cannot be loaded or cut, or an activation is not finite.
        """
        return {
            side: collect_activations(
                self.splicer(side),
                sequences,
                d_model=checkpoint.d_model,
                batch_size=batch_size,
                device=self.device,
                path=directory / f"{side}.npy",
                progress=Meter(f"activations of {side}", len(sequences), "sequences").update,
            )
            for side, checkpoint in self.checkpoints.items()
        }
