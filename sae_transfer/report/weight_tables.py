"""How far the two models are apart: their weights by kind, and their activations at the site."""

import math
from collections.abc import Iterable

from sae_transfer.report.formats import Line, Table
from sae_transfer.report.results import Results, WeightPart

KINDS = {
    "embedding": "embedding",
    "position_embedding": "position embedding",
    "q": "attention q",
    "k": "attention k",
    "v": "attention v",
    "o": "attention o",
    "mlp_in": "MLP in",
    "mlp_gate": "MLP gate",
    "mlp_out": "MLP out",
    "norm": "norms",
    "unembedding": "unembedding",
    "other": "other",
}
"""In the order in which the residual stream meets them; biases follow."""

ACTIVATION_QUANTITIES = {
    "cosine": "Cosine",
    "relative_distance": "Relative distance, raw",
    "relative_distance_scaled": "Relative distance, scaled",
}
ACTIVATION_POSITIONS = {"kept": "all", "excluded": "without outliers"}


def kind_name(kind: str) -> str:
    """A kind in words; a bias is named after its weight."""
    weight = kind.removesuffix("_bias")
    return KINDS.get(weight, weight.replace("_", " ")) + " bias" * (weight != kind)


def kind_order(kind: str) -> tuple[bool, int, str]:
    """Sort key of kinds: weights as the residual stream meets them, then biases."""
    weight = kind.removesuffix("_bias")
    return weight != kind, list(KINDS).index(weight) if weight in KINDS else len(KINDS), kind


def pooled(parts: Iterable[WeightPart]) -> float:
    """Relative difference ||W_chat - W_base|| / ||W_base|| of all parts together: squares are summed, then divided."""
    difference, base = (
        sum(squares) for squares in zip(*((p.norm_difference**2, p.norm_base**2) for p in parts), strict=True)
    )
    return math.sqrt(difference / base) if base else math.nan


def weight_table(results: Results) -> Table:
    """Relative difference of the weights by kind, over all layers and in the layers that differ least and most."""
    lines = []
    for kind in sorted({part.kind for part in results.weights_by_kind}, key=kind_order):
        parts = [part for part in results.weights_by_kind if part.kind == kind]
        value, n_parameters = pooled(parts), sum(part.n_parameters for part in parts)
        of = {"Kind": kind_name(kind)}
        printed = {"Parameters": f"{n_parameters:,}", "Relative difference": _four(value)}
        exact: dict[str, str | float] = {"Parameters": n_parameters, "Relative difference": value}
        layers = [p for p in parts if p.layer is not None and math.isfinite(p.relative_difference)]
        for head, choose in (("Smallest", min), ("Largest", max)):
            found = choose(layers, key=lambda part: part.relative_difference, default=None)
            printed[head] = f"{_four(found.relative_difference)} (layer {found.layer})" if found else ""
            exact |= {
                head: found.relative_difference if found else "",
                f"{head} at layer": found.layer or 0 if found else "",
            }
        lines.append(Line(of | printed, {**of, **exact, "kind_id": kind}))
    title = "Weights: ||W_chat - W_base|| / ||W_base|| by kind, over all layers together and in single layers"
    return Table("weights", [(f"{title}.", lines)])


def _four(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.4f}"


def activation_table(results: Results) -> Table:
    """Cosine and relative distance of the two models' activations at the site, position by position."""
    lines = []
    for policy, found in results.activation_difference.items():
        for key, quantity in ACTIVATION_QUANTITIES.items():
            if key not in found:
                continue
            of = {"Quantity": quantity, "Positions": ACTIVATION_POSITIONS.get(policy, policy)}
            heads = {"mean": "Mean", "median": "Median", "p5": "5%", "p95": "95%"}
            values = {head: float(found[key][stat]) for stat, head in heads.items()}
            n = found["n_positions"]
            printed = {head: f"{value:.4f}" for head, value in values.items()}
            lines.append(
                Line({**of, "N": f"{n:,}", **printed}, {**of, "N": n, **values, "quantity_id": key, "outliers": policy})
            )
    title = "Activations at the site on the same tokens; relative distance is ||x_chat - x_base|| / ||x_base||"
    return Table("activations", [(f"{title}.", lines)])
