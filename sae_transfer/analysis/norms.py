"""Scaled norms: which positions are outliers, and the threshold that `auto` proposes. Shared by the stages."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_transfer.errors import StudyError

# `auto` looks for an empty stretch of norms that is at least this wide (upper end over lower end): ten times the
# spacing of neighbours in the upper tail of 100,000 norms, which is one or two percent ...
MIN_GAP_RATIO = 1.2
# ... and has at most this share of either model's positions above it: an outlier is rare (the post: under 1%; short
# contexts have more BOS).
MAX_OUTLIER_FRACTION = 0.05


OutlierPolicy = Literal["excluded", "kept"]


class Gap(NamedTuple):
    """An empty stretch of scaled norms, and the threshold in it."""

    threshold: float
    low: float
    high: float

    @property
    def explanation(self) -> str:
        """Why the threshold lies where it does."""
        return (
            f"auto: no position of either model has a scaled norm between {self.low:.1f} and {self.high:.1f}, a factor"
            f" {self.high / self.low:.2f}; it is the lowest such gap (at least {MIN_GAP_RATIO}) with at most"
            f" {MAX_OUTLIER_FRACTION:.0%} of either model's positions above it; the threshold is its geometric middle"
        )


def is_outlier(norms: NDArray[np.float64], norm_scale: float, threshold: float | None) -> NDArray[np.bool_]:
    """Positions with ||x'|| > T, strictly; none without a T. `[seq pos]`."""
    return np.zeros(norms.shape, bool) if threshold is None else norms * norm_scale > threshold


def counted_positions(
    section: NDArray[np.bool_], outliers: NDArray[np.bool_], policies: Sequence[OutlierPolicy]
) -> dict[str, NDArray[np.bool_]]:
    """Policy -> the positions of a section that are spliced and counted, `[seq pos]`.

    Raises:
        StudyError: Excluding outliers leaves none.
    """
    counted = {policy: section & ~outliers if policy == "excluded" else section for policy in policies}
    if section.any() and not all(positions.any() for positions in counted.values()):
        raise StudyError(
            "evaluate.outlier_threshold: every position is an outlier, so nothing is left to count",
            "raise it, or ask for auto (--set evaluate.outlier_threshold=auto)",
        )
    return counted


def choose_threshold(
    asked: float | str, policies: Sequence[OutlierPolicy], scaled_norms: Mapping[str, NDArray[np.float64]]
) -> float | None:
    """T as asked for, or as `auto` finds it; None where `auto` is asked for and no policy needs it.

    Raises:
        StudyError: `auto` finds none.
    """
    if not isinstance(asked, str):
        return asked
    return find_gap(list(scaled_norms.values())).threshold if "excluded" in policies else None


def find_gap(scaled_norms: Sequence[NDArray[np.float64]]) -> Gap:
    """The lowest wide gap in the upper tail of the scaled norms of both models: above it stand the outliers.

    Args:
        scaled_norms: `[seq pos]` of each model.

    Returns:
        The gap; its threshold is the geometric middle, three significant digits.

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
    return Gap(float(f"{(low * high) ** 0.5:.3g}"), float(low), float(high))
