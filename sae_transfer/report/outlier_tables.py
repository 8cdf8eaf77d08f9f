"""The tables of outlier positions: the post's, their tokens, and every metric against the threshold."""

from collections.abc import Iterable

from sae_transfer.report.columns import METRICS
from sae_transfer.report.formats import Line, Table
from sae_transfer.report.results import Results, Row, number

KINDS = {
    "bos_first": "BOS at position 0",
    "bos_later": "BOS later",
    "first_newline": "first newline",
    "newline": "later newlines",
    "paragraph": "paragraph symbols",
    "early": "positions 1 to 9",
    "other": "other",
}
"""In the order in which a position takes the first that fits."""

SWEEP_METRICS = ("l0", "ce_recovered", "ce_delta", "kl", "explained_variance_per_token", "mse")


def outlier_table(results: Results) -> Table:
    """The post's table: threshold, fraction and breakdown a model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in results.outlier_kinds):
        rows = [row for row in results.outlier_kinds if row["model"] == model]
        first = rows[0]
        cell = {"Model": model.capitalize()}
        parts = breakdown({row["kind"]: number(row, "share") for row in rows})
        printed = {
            "Outlier threshold": f"{number(first, 'threshold'):.4g}",
            "Frac outliers": f"{number(first, 'fraction'):.6f}",
            "Count": f"{int(first['n_outliers']):,}",
            "Breakdown": parts,
        }
        exact = {
            "Outlier threshold": first["threshold"],
            "Frac outliers": first["fraction"],
            "Count": first["n_outliers"],
            "Breakdown": parts,
            **{column: first.get(column, "") for column in ("threshold_source", "n_tokens", "norm_scale")},
            **{f"share_{row['kind']}": row["share"] for row in rows},
        }
        lines.append(Line(cell | printed, cell | exact))
    n_tokens = int(results.outlier_kinds[0]["n_tokens"]) if lines else 0
    title = f"Positions whose scaled norm exceeds the threshold, of {n_tokens:,}, and what they are."
    return Table("outliers", [(title, lines)])


def breakdown(shares: dict[str, float]) -> str:
    """What the outliers are, largest share first, in the post's form: `63% BOS, 26% first newline`.

    Args:
        shares: Kind -> fraction of all outliers.

    Returns:
        BOS at position 0 and later are one part, taken apart in brackets where there are both; `none` without outliers.
    """
    first, later = shares.get("bos_first", 0.0), shares.get("bos_later", 0.0)
    parts = {KINDS[kind]: share for kind, share in shares.items() if not kind.startswith("bos_")}
    bos = "BOS"
    if first > 0 and later > 0:
        bos = f"BOS ({_percent(first)} at position 0, {_percent(later)} later)"
    elif first + later > 0:
        bos = KINDS["bos_first" if first > 0 else "bos_later"]
    parts = {bos: first + later} | parts
    ordered = sorted(((share, name) for name, share in parts.items() if share > 0), key=lambda part: -part[0])
    return ", ".join(f"{_percent(share)} {name}" for share, name in ordered) or "none"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.005 else "<1%"


def outlier_token_table(results: Results) -> Table:
    """The most frequent tokens among the outliers of each model."""
    lines = []
    for row in results.outlier_tokens:
        cell = {"Model": row["model"].capitalize(), "Kind": KINDS[row["kind"]], "Token": row["token"]}
        printed = {
            "Id": row["token_id"],
            "Count": f"{int(row['count']):,}",
            "Mean norm": f"{number(row, 'mean_norm'):.1f}",
            "Max norm": f"{number(row, 'max_norm'):.1f}",
        }
        exact = {
            "Id": row["token_id"],
            "Count": row["count"],
            "Mean norm": row["mean_norm"],
            "Max norm": row["max_norm"],
        }
        lines.append(Line(cell | printed, cell | exact))
    return Table("outlier_tokens", [("The most frequent outlier tokens; norms are scaled.", lines)])


def threshold_table(results: Results, labels: dict[str, str]) -> Table:
    """Every metric against the threshold, outliers excluded.

    Args:
        results: Of a run.
        labels: SAE -> what to call it.

    Returns:
        A line a (SAE, model, threshold).
    """
    return Table(
        "thresholds",
        [
            (
                "Metrics against the outlier threshold, outliers excluded.",
                _threshold_lines(results.threshold_sweep, labels),
            )
        ],
    )


def _threshold_lines(rows: Iterable[Row], labels: dict[str, str]) -> list[Line]:
    lines = []
    for row in rows:
        cell = {"SAE": labels.get(row["sae"], row["sae"]), "Model": row["model"].capitalize()}
        metrics = {name: METRICS[name] for name in SWEEP_METRICS if name in row}
        printed = {
            "Threshold": f"{number(row, 'threshold'):.4g}",
            "Removed %": f"{100 * number(row, 'fraction_removed'):.3f}",
            **{metric.label: metric.printed(number(row, name)) for name, metric in metrics.items()},
        }
        exact = {
            "Threshold": row["threshold"],
            "Removed %": 100 * number(row, "fraction_removed"),
            **{metric.label: metric.shown(number(row, name)) for name, metric in metrics.items()},
            "sae_id": row["sae"],
        }
        lines.append(Line(cell | printed, cell | exact))
    return lines
