"""How the metrics of rows.csv are named and rounded. Numbers are rounded here and nowhere else."""

import math
from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric of rows.csv is shown."""

    label: str
    factor: int = 1
    """What a value is multiplied by: 100 turns a fraction into percent."""

    decimals: int | None = None
    """Digits after the point; unset shows at least four significant digits, for values of any size."""

    def shown(self, value: float) -> float:
        """The unrounded value in the unit of the label."""
        return self.factor * value

    def printed(self, value: float) -> str:
        """The rounded value; NaN, a metric undefined for its cell or an interval that was not taken, reads n/a."""
        shown = self.shown(value)
        if not math.isfinite(shown):
            return "n/a" if math.isnan(shown) else str(shown)
        # `z` leaves no sign on what rounds to zero; the exponent is taken after rounding, so that 999.96 reads 1000.
        exponent = int(f"{shown:.3e}".partition("e")[2])
        return f"{shown:z.{max(0, 3 - exponent) if self.decimals is None else self.decimals}f}"

    def interval(self, value: float, low: float, high: float) -> str:
        """A value with its interval."""
        return f"{self.printed(value)} [{self.printed(low)}, {self.printed(high)}]"


POST_METRICS = {
    "l0": Metric("L0", decimals=1),
    "ce_recovered": Metric("CE Loss rec %", factor=100, decimals=2),
    "ce_clean": Metric("Clean CE Loss", decimals=4),
    "ce_sae": Metric("SAE CE Loss", decimals=4),
    "ce_delta": Metric("CE Delta", decimals=4),
    "ce_zero": Metric("0 Abl. CE loss", decimals=4),
    "explained_variance_per_token": Metric("Explained Variance %", factor=100, decimals=1),
    "mse": Metric("MSE"),
}
"""The columns of the post's tables, in its order and words. Losses are in nats."""

METRICS = {
    **POST_METRICS,
    "explained_variance": Metric("Explained Variance (ratio of sums) %", factor=100, decimals=1),
    "kl": Metric("KL", decimals=4),
    "top1_agreement": Metric("Top-1 agreement %", factor=100, decimals=2),
    "ce_mean": Metric("Mean Abl. CE loss", decimals=4),
    "frac_alive": Metric("Alive features %", factor=100, decimals=2),
}

AXES = {
    "l0": "L0 (active features)",
    "ce_recovered": "CE recovered (%)",
    "ce_delta": "CE delta (nats)",
    "explained_variance_per_token": "Explained variance (%)",
    "mse": "MSE (scaled units)",
}
"""What a figure's axis says of a metric, with its unit."""

WITHOUT_GAP = frozenset({"ce_clean", "ce_zero", "ce_mean", "ce_sae"})
"""Three belong to the model alone, so two SAEs have the same; the gap in ce_sae is that in ce_delta."""

CONTEXT = (
    *("section", "sae", "sae_trained_on", "architecture", "d_sae", "sparsity_key", "sparsity_value", "seed"),
    *("hook_name", "dtype", "scale", "norm_scale", "sae_scale", "outliers", "outlier_threshold", "averaging"),
    *("n_tokens", "n_loss_tokens", "n_outliers", "n_sequences"),
)
"""The columns of rows.csv that say what a row is about; `model` is a column of every table already."""
