"""Activations of a model over the evaluation sequences, their norms, the outlier threshold. Shared by the stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sae_transfer.errors import StudyError
from sae_transfer.models.splice import Splicer

# `auto` looks for an empty stretch of norms that is at least this wide (upper end over lower end): ten times the
# spacing of neighbours in the upper tail of 100,000 norms, which is one or two percent ...
MIN_GAP_RATIO = 1.2
# ... and has at most this share of either model's positions above it: an outlier is rare (the post: under 1%; short
# contexts have more BOS).
MAX_OUTLIER_FRACTION = 0.05


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
        batch_size: Sequences a pass.
        device: Where the model is.
        path: A file for the activations, 4 bytes a value.
        progress: Told the number of sequences done.

    Returns:
        The activations and norms.

    Raises:
        StudyError: An activation is not finite.
    """
    acts = np.lib.format.open_memmap(path, "w+", np.float32, (*sequences.shape, d_model))
    norms = np.empty(sequences.shape)
    for start in range(0, len(sequences), batch_size):
        tokens = torch.from_numpy(sequences[start : start + batch_size].astype(np.int64)).to(device)
        batch = splicer.run_to(tokens).float()
        norms[start : start + batch_size] = batch.norm(dim=-1).double().cpu().numpy()
        acts[start : start + batch_size] = batch.cpu().numpy()
        progress(min(start + batch_size, len(sequences)))
    if not np.isfinite(norms).all():
        row, position = np.argwhere(~np.isfinite(norms))[0]
        raise StudyError(
            f"the activation at evaluation sequence {row}, position {position} is not finite",
            "evaluate in float32 (pair.dtype: float32)",
        )
    return SiteActivations(acts, norms)


def propose_threshold(scaled_norms: Sequence[NDArray[np.float64]]) -> float:
    """The lowest wide gap in the upper tail of the scaled norms of both models: above it stand the outliers.

    Args:
        scaled_norms: `[seq pos]` of each model.

    Returns:
        The geometric middle of the gap, in units of scaled norm, three significant digits.

    Raises:
        StudyError: No gap; a number has to be given.
    """
    floor = max(float(np.quantile(norms, 1 - MAX_OUTLIER_FRACTION)) for norms in scaled_norms)
    tail = np.sort(np.concatenate([norms[norms >= floor].ravel() for norms in scaled_norms]))
    ratios = tail[1:] / tail[:-1]
    wide = np.flatnonzero(ratios >= MIN_GAP_RATIO)
    if len(wide) == 0:
        widest = f"; the widest gap in the upper tail is a factor {ratios.max():.2f}" if len(ratios) else ""
        raise StudyError(
            f"evaluate.outlier_threshold: auto found no gap in the scaled norms (largest {tail[-1]:.1f}{widest},"
            f" a factor {MIN_GAP_RATIO} is asked for)",
            "give a number (--set evaluate.outlier_threshold=50), or keep every position"
            " (--set evaluate.outliers=[kept])",
        )
    low, high = tail[wide[0]], tail[wide[0] + 1]
    return float(f"{(low * high) ** 0.5:.3g}")
