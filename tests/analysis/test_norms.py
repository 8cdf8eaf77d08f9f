"""The outlier threshold that `auto` proposes."""

import numpy as np
import pytest

from sae_transfer.analysis.norms import find_gap
from sae_transfer.errors import StudyError


def norms_with(outliers: list[float], seed: int = 0) -> np.ndarray:
    norms = np.random.default_rng(seed).normal(10, 1, (100, 64))
    norms.flat[: len(outliers)] = outliers
    return norms


def test_the_threshold_lies_in_the_lowest_wide_gap_of_both_models() -> None:
    gap = find_gap([norms_with([40.0] * 50), norms_with([90.0] * 50, seed=1)])
    threshold = gap.threshold
    assert gap.low < 15 < threshold < 40 == gap.high
    assert "between" in gap.explanation
    assert threshold == float(f"{threshold:.3g}")


def test_no_gap_asks_for_a_number() -> None:
    with pytest.raises(StudyError, match="auto found no gap"):
        find_gap([norms_with([]), norms_with([])])


def test_a_gap_below_more_than_a_few_percent_of_positions_is_none() -> None:
    with pytest.raises(StudyError, match="auto found no gap"):
        find_gap([norms_with([40.0] * 640), norms_with([])])
