"""Does an SAE transfer? The rule, the noise floor between seeds, and gaps at equal L0: pure functions of numbers."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

Word = Literal["transfers", "does not transfer", "undecided"]


class Gap(NamedTuple):
    """A paired gap transferred - native in CE delta, nats, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class AtEqualL0(NamedTuple):
    """A native frontier's value at another SAE's L0; NaN with the reason where the frontier does not reach."""

    value: float
    reason: str = ""


def threshold(margin: float, noise_floor: float | None) -> float:
    """The largest gap that counts as none, nats: the margin, or the noise floor where that is larger."""
    return margin if noise_floor is None else max(margin, noise_floor)


def verdict(gap: Gap, limit: float) -> Word:
    """Judge one gap by its whole interval.

    Args:
        gap: In CE delta; an interval that could not be taken is NaN, and then nothing is decided.
        limit: As `threshold` gives it.

    Returns:
        `transfers` when the interval lies below the limit, `does not transfer` when above; an end on it is undecided.
    """
    if gap.high < limit:
        return "transfers"
    if gap.low > limit:
        return "does not transfer"
    return "undecided"


def rule(margin: float) -> str:
    """The rule in words, to be printed beside every verdict."""
    return (
        "An SAE transfers when the whole 95% bootstrap interval of its gap in CE delta to the native SAE (transferred"
        f" minus native, same model, paired over sequences) lies below {margin:g} nats (report.margin), or below the"
        " seed noise floor where that is known and larger; it does not transfer when the whole interval lies above;"
        " else the question is undecided."
    )


def noise_floor(gaps: Iterable[float]) -> float | None:
    """How far two native SAEs of one model are apart in CE delta when only the seed differs.

    The root mean square over pairs of seeds: with two seeds the absolute gap, and, unlike the largest, no larger for
    having tried more seeds.

    Args:
        gaps: CE-delta gaps of pairs, nats, of either sign.

    Returns:
        The floor in nats; None without a pair.
    """
    known = [gap for gap in gaps if math.isfinite(gap)]
    return math.sqrt(sum(gap**2 for gap in known) / len(known)) if known else None


def at_equal_l0(l0: float, frontier: Sequence[tuple[float, float]]) -> AtEqualL0:
    """Interpolate a native frontier linearly at an L0, never beyond its ends.

    Args:
        l0: Of the transferred SAE.
        frontier: (L0, metric) of the native SAEs of equal settings but sparsity, in any order.

    Returns:
        The metric there, or NaN and why.
    """
    points = sorted(point for point in frontier if all(map(math.isfinite, point)))
    if len(points) < 2:
        return AtEqualL0(math.nan, "one native sparsity only" if points else "no native SAE")
    if not points[0][0] <= l0 <= points[-1][0]:
        return AtEqualL0(math.nan, f"L0 {l0:.1f} is outside the native {points[0][0]:.1f} to {points[-1][0]:.1f}")
    for (left, at_left), (right, at_right) in pairwise(points):
        if l0 <= right:
            share = (l0 - left) / (right - left) if right > left else 0.0
            return AtEqualL0(at_left + share * (at_right - at_left))
    raise AssertionError("the last point was compared above")
