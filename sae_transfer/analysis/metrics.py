"""Per-sequence sums -> metrics, bootstrap intervals over sequences, paired gaps. Shared by the stages; no torch.

Numerators and denominators stay apart, in float64, one number a sequence, until the last line of `metric_values`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Averaging = Literal["pooled", "batch"]

N_RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
PERCENTILES = (2.5, 97.5)
RESAMPLES_AT_ONCE = 500  # a divisor; bounds draws and their float64 copy

# What a cell's sums hold, `[seq]` each; see METHOD's table of metrics for the symbols.
SUMS = (
    "n_tokens",  # positions that l0, mse and both explained variances count
    "l0",  # sum over them of #{f_t > 0}
    "squared_error",  # sum of ||x'_t - x^_t||^2
    "variance",  # sum of ||x'_t - mu||^2
    "explained_per_token",  # sum of 1 - ||x'_t - x^_t||^2 / ||x'_t - mu||^2
    "n_loss_tokens",  # positions that have a next token
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "kl",
    "top1_agreement",
)
# frac_alive is a property of the whole token set: it has no interval, since a resample, which repeats some sequences
# and lacks a third of them, always has fewer active features than the set itself.
METRICS = (
    "l0",
    "frac_alive",
    "ce_recovered",
    "ce_clean",
    "ce_sae",
    "ce_delta",
    "ce_zero",
    "ce_mean",
    "kl",
    "top1_agreement",
    "explained_variance_per_token",
    "explained_variance",
    "mse",
)
INTERVAL_METRICS = tuple(metric for metric in METRICS if metric != "frac_alive")


class Estimate(NamedTuple):
    """A value with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def metric_values(totals: Mapping[str, Array]) -> dict[str, Array]:
    """Every metric but frac_alive from totals of `SUMS`.

    l0, mse: mean over counted positions (mse summed over d_model, in scaled units).
    explained_variance_per_token: mean over positions of a ratio (the post's); explained_variance: ratio of sums (R^2).
    ce_*: mean over positions with a next token, nats; ce_delta = ce_sae - ce_clean;
    ce_recovered = (ce_zero - ce_sae) / (ce_zero - ce_clean), a fraction.
    kl, top1_agreement: mean over positions with a next token.

    Args:
        totals: Sums over the sequences of one average, any shape.

    Returns:
        Metric -> values of the same shape. Where nothing is counted the value is NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n, n_loss = totals["n_tokens"], totals["n_loss_tokens"]
        ce = {name: totals[name] / n_loss for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean")}
        return {
            "l0": totals["l0"] / n,
            "ce_recovered": (ce["ce_zero"] - ce["ce_sae"]) / (ce["ce_zero"] - ce["ce_clean"]),
            **ce,
            "ce_delta": ce["ce_sae"] - ce["ce_clean"],
            "kl": totals["kl"] / n_loss,
            "top1_agreement": totals["top1_agreement"] / n_loss,
            "explained_variance_per_token": totals["explained_per_token"] / n,
            "explained_variance": 1 - totals["squared_error"] / totals["variance"],
            "mse": totals["squared_error"] / n,
        }


@dataclass(frozen=True)
class Summary:
    """A cell's metrics and their bootstrap replicates `[resample]`, which pair with those of any other cell."""

    values: dict[str, float]
    replicates: dict[str, Array]

    def estimate(self, metric: str) -> Estimate:
        """The metric with its interval."""
        return Estimate(self.values[metric], *np.percentile(self.replicates[metric], PERCENTILES))

    def gap(self, native: "Summary", metric: str) -> Estimate:
        """This cell's metric minus another's, with the interval of the paired difference."""
        low, high = np.percentile(self.replicates[metric] - native.replicates[metric], PERCENTILES)
        return Estimate(self.values[metric] - native.values[metric], low, high)


class Bootstrap:
    """One set of draws of whole sequences, used for every cell so that differences are paired.

    Under `averaging: batch` the draws are of whole batches: a metric is then a mean over batches, and the batch is the
    smallest part that has one.
    """

    def __init__(self, n_sequences: int, averaging: Averaging, batch_size: int) -> None:
        """Draw.

        Args:
            n_sequences: Sequences in the token set.
            averaging: `pooled`: ratios of sums over the token set. `batch`: every metric a batch, then their mean.
            batch_size: Sequences of a batch, in order; the last may be smaller.
        """
        self.averaging = averaging
        self._starts = np.arange(0, n_sequences, batch_size if averaging == "batch" else 1)
        n_units = len(self._starts)
        generator = np.random.default_rng(BOOTSTRAP_SEED)
        self._counts = np.empty((N_RESAMPLES, n_units), np.uint16)
        for start in range(0, N_RESAMPLES, RESAMPLES_AT_ONCE):
            chosen = generator.integers(n_units, size=(RESAMPLES_AT_ONCE, n_units))
            chosen += np.arange(RESAMPLES_AT_ONCE)[:, None] * n_units
            counts = np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape)
            self._counts[start : start + RESAMPLES_AT_ONCE] = counts

    def summarise(self, sums: Mapping[str, Array]) -> Summary:
        """Metrics of a cell and their replicates.

        Args:
            sums: `SUMS` -> `[seq]`.

        Returns:
            The summary.
        """
        units = {name: np.add.reduceat(np.asarray(sums[name], np.float64), self._starts) for name in SUMS}
        if self.averaging == "batch":
            per_batch = metric_values(units)
            values = {metric: float(per_batch[metric].mean()) for metric in INTERVAL_METRICS}
            drawn = self._resample(np.stack([per_batch[metric] for metric in INTERVAL_METRICS], 1)) / len(self._starts)
            replicates = {metric: drawn[:, i] for i, metric in enumerate(INTERVAL_METRICS)}
        else:
            values = {k: float(v) for k, v in metric_values({n: u.sum() for n, u in units.items()}).items()}
            drawn = self._resample(np.stack([units[name] for name in SUMS], 1))
            replicates = metric_values({name: drawn[:, i] for i, name in enumerate(SUMS)})
        return Summary(values, replicates)

    def _resample(self, columns: Array) -> Array:
        """Totals `[resample column]` of columns `[unit column]`."""
        parts = range(0, N_RESAMPLES, RESAMPLES_AT_ONCE)
        return np.concatenate([self._counts[i : i + RESAMPLES_AT_ONCE].astype(np.float64) @ columns for i in parts])
