"""Sums to metrics, intervals and gaps."""

import numpy as np
import pytest

from sae_transfer.analysis.metrics import INTERVAL_METRICS, SUMS, Bootstrap


def some_sums(n_seq: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    sums = {name: generator.uniform(1, 2, n_seq) for name in SUMS}
    sums["n_tokens"] = generator.integers(20, 30, n_seq).astype(float)
    sums["n_loss_tokens"] = np.full(n_seq, 31.0)
    sums["ce_zero"] = sums["ce_clean"] + 5
    return sums


def test_pooled_metrics_are_ratios_of_sums() -> None:
    sums = some_sums()
    values = Bootstrap(12, "pooled", 5).summarise(sums).values
    total = {name: array.sum() for name, array in sums.items()}
    assert values["l0"] == total["l0"] / total["n_tokens"]
    assert values["mse"] == total["squared_error"] / total["n_tokens"]
    assert values["explained_variance"] == 1 - total["squared_error"] / total["variance"]
    assert values["explained_variance_per_token"] == total["explained_per_token"] / total["n_tokens"]
    assert values["ce_delta"] == pytest.approx((total["ce_sae"] - total["ce_clean"]) / total["n_loss_tokens"])
    expected = (total["ce_zero"] - total["ce_sae"]) / (total["ce_zero"] - total["ce_clean"])
    assert values["ce_recovered"] == pytest.approx(expected, rel=1e-12)


def test_batch_averages_are_means_over_batches_in_order_the_last_one_smaller() -> None:
    sums = some_sums()
    values = Bootstrap(12, "batch", 5).summarise(sums).values
    parts = [slice(0, 5), slice(5, 10), slice(10, 12)]
    mse = [sums["squared_error"][p].sum() / sums["n_tokens"][p].sum() for p in parts]
    assert values["mse"] == pytest.approx(np.mean(mse), rel=1e-12)


def test_the_bootstrap_is_that_of_whole_sequences() -> None:
    sums = some_sums()
    summary = Bootstrap(12, "pooled", 5).summarise(sums)
    estimate = summary.estimate("mse")
    assert estimate.low < estimate.value < estimate.high
    # for a ratio of means the delta method gives the standard error in closed form
    residual = sums["squared_error"] - estimate.value * sums["n_tokens"]
    expected = np.sqrt((residual**2).sum()) / sums["n_tokens"].sum()
    assert np.std(summary.replicates["mse"]) == pytest.approx(expected, rel=0.03)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * expected, rel=0.05)


def test_intervals_are_the_same_every_time_and_gaps_are_paired() -> None:
    sums = some_sums()
    shifted = {**sums, "ce_sae": sums["ce_sae"] + 0.1 * sums["n_loss_tokens"]}
    bootstrap = Bootstrap(12, "pooled", 5)
    ours, theirs = bootstrap.summarise(shifted), bootstrap.summarise(sums)
    gap = ours.gap(theirs, "ce_delta")
    assert gap.value == pytest.approx(0.1) and gap.low == pytest.approx(0.1) and gap.high == pytest.approx(0.1)
    again = Bootstrap(12, "pooled", 5).summarise(sums)
    assert all(np.array_equal(again.replicates[m], theirs.replicates[m]) for m in INTERVAL_METRICS)
