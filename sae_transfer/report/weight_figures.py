"""How far the two models' weights are apart: by layer and kind of one study, and several studies side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sae_transfer.errors import StudyError
from sae_transfer.report.results import Results, WeightPart
from sae_transfer.report.style import (
    LINES,
    MARKERS,
    PALETTE,
    WIDE,
    Plot,
    legend_below,
    new_figure,
    plain,
    plain_log,
    styled,
)
from sae_transfer.report.weight_tables import kind_name, kind_order, pooled

AXIS = r"$\Vert W_\mathrm{chat} - W_\mathrm{base}\Vert \,/\, \Vert W_\mathrm{base}\Vert$"


def weight_differences(results: Results) -> list[Plot]:
    """Relative difference per layer, a line a kind; kinds outside the layers stand beside it."""
    parts = [part for part in results.weights_by_kind if math.isfinite(part.relative_difference)]
    if not parts:
        return []
    kinds = _kinds(parts)
    outside = [part for part in parts if part.layer is None]
    figure = new_figure(WIDE, 3.1 + 0.17 * math.ceil(len(kinds) / 4))
    n_panels = 2 if outside else 1
    left, *right = figure.subplots(1, n_panels, squeeze=False, width_ratios=(4, 1.3)[:n_panels], sharey=True)[0]
    handles = []
    for index, kind in enumerate(kinds):
        look = {**_look(index), "linestyle": LINES[index % len(LINES)], "markersize": 3.5}
        layers = sorted((p.layer, p.relative_difference) for p in parts if p.kind == kind and p.layer is not None)
        if layers:
            left.plot(*zip(*layers, strict=True), **look)
        handles.append(Line2D([], [], label=kind_name(kind), **look))
    for axes in right:
        names = _kinds(outside)
        for part in outside:
            axes.plot(names.index(part.kind), part.relative_difference, linestyle="", **_look(kinds.index(part.kind)))
        _name_kinds(axes, names)
        axes.set_title("outside the layers", loc="left")
    _difference_axis(left, [part.relative_difference for part in parts])
    left.set_xlabel("Layer")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("in the layers", loc="left")
    legend_below(figure, handles)
    caption = "Relative difference between the chat and the base model's weights, by layer and kind."
    return [Plot("weights", caption, figure)]


def weights_figure(runs: Sequence[Path]) -> Figure:
    """Several studies in one figure, as the post holds Gemma against the others; `Plot(...).write` saves it.

    Args:
        runs: Run directories whose weights were compared.

    Returns:
        Left, the relative difference of each kind over all layers; right, of each layer over all kinds, against depth.

    Raises:
        StudyError: A run has no comparison of weights.
    """
    studies = []
    for run in runs:
        results = Results(run)
        if not results.weights_by_kind:
            raise StudyError(f"{run}: its weights were not compared", "sae-transfer weights CONFIG")
        studies.append((results.study.name if results.study else run.name, results.weights_by_kind))
    kinds = _kinds([part for _, parts in studies for part in parts])
    drawn = []
    with styled():
        figure = new_figure(WIDE, 3.4)
        by_kind, by_layer = figure.subplots(1, 2, width_ratios=(1.3, 1), sharey=True)
        handles = []
        for index, (name, parts) in enumerate(studies):
            look, line = _look(index), LINES[index % len(LINES)]
            found = [
                (place, pooled(p for p in parts if p.kind == kind))
                for place, kind in enumerate(kinds)
                if kind in _kinds(parts)
            ]
            by_kind.plot(*zip(*found, strict=True), linestyle="", **look)
            n_layers = 1 + max((part.layer for part in parts if part.layer is not None), default=0)
            layers = [(layer, [part for part in parts if part.layer == layer]) for layer in range(n_layers)]
            depth = [((layer + 0.5) / n_layers, pooled(within)) for layer, within in layers if within]
            by_layer.plot(*zip(*depth, strict=True) if depth else ([], []), linestyle=line, markersize=3.5, **look)
            handles.append(Line2D([], [], linestyle=line, label=plain(name), **look))
            drawn += [value for _, value in (*found, *depth)]
        _name_kinds(by_kind, kinds)
        by_kind.set_title("by kind, all layers together", loc="left")
        by_layer.set_title("by depth, all kinds together", loc="left")
        by_layer.set_xlabel("Depth of the layer (fraction)")
        by_layer.set_xlim(0, 1)
        _difference_axis(by_kind, drawn)
        legend_below(figure, handles)
        return figure


def _kinds(parts: Sequence[WeightPart]) -> list[str]:
    return sorted({part.kind for part in parts}, key=kind_order)


def _look(index: int) -> dict[str, Any]:
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def _name_kinds(axes: Axes, kinds: Sequence[str]) -> None:
    names = [kind_name(kind) for kind in kinds]
    axes.set_xticks(range(len(kinds)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(kinds) - 0.4)


def _difference_axis(axes: Axes, values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        plain_log(axes, "y")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(AXIS)


def write_weights_of(runs: Sequence[Path]) -> Path:
    """Write `weights_figure` of several runs into the first one's figures.

    Args:
        runs: Run directories whose weights were compared.

    Returns:
        The PNG.

    Raises:
        StudyError: A run has no comparison of weights, or the figure cannot be written.
    """
    caption = "Relative difference of the weights, by kind and by layer, of several pairs."
    return Plot("weights_of_several", caption, weights_figure(runs)).write(runs[0] / "report" / "figures")[0]
