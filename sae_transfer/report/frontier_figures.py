"""Frontiers: sparsity against what the model loses, of one study and of a sweep."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from sae_transfer.report.cells import Policy, blocks, policies, role
from sae_transfer.report.columns import AXES, METRICS
from sae_transfer.report.figures import RELATIONS, relation
from sae_transfer.report.results import Cells, Row, number
from sae_transfer.report.style import (
    BLACK,
    MARKERS,
    MODEL_COLOURS,
    WIDE,
    Plot,
    legend_below,
    new_figure,
    plain,
    plain_log,
    spread_axis,
)
from sae_transfer.report.sweep_results import Group


def frontiers(cells: Cells) -> list[Plot]:
    """L0 against CE recovered and against CE delta of all SAEs; one figure a policy."""
    found = []
    for block in blocks(cells.rows):
        figure = new_figure(WIDE, 3.2)
        for axes, metric in zip(figure.subplots(1, 2), ("ce_recovered", "ce_delta"), strict=True):
            for curve in _curves(block.rows):
                _draw(axes, curve, metric, MODEL_COLOURS[curve[0]["model"]])
            _finish(axes, block.rows, metric)
        kinds = {(row["model"], relation(row)) for row in block.rows}
        handles = [
            _mark(MODEL_COLOURS[m], RELATIONS[r][1], f"{RELATIONS[r][0]} on {m} model")
            for r in RELATIONS
            for m in MODEL_COLOURS
            if (m, r) in kinds
        ]
        legend_below(figure, handles, columns=2)
        caption = (
            f"Sparsity against what the model loses, {block.circumstances()} Error bars: 95% intervals. Lines join SAEs"
            " of equal settings but sparsity."
        )
        found.append(Plot(f"frontier_{block.policy.name}", caption, figure))
    return found


class Quantity(NamedTuple):
    """What tells the curves of a sweep apart, by colour or by marker."""

    name: str
    value: Callable[[Group, Row], int]


WIDTH = Quantity("width", lambda group, row: int(row["d_sae"]))
LAYER = Quantity("layer", lambda group, row: group.layer)
FILLS: dict[str, dict[str, Any]] = {
    "native": {},
    "transferred": {"markerfacecolor": "white"},
    "finetuned": {"fillstyle": "left"},
    "control": {"fillstyle": "top"},
}
"""Of markers whose shape is taken: how an SAE stands to the model."""


def sweep_frontiers(groups: Sequence[Group]) -> list[Plot]:
    """L0 against CE recovered, coloured by width and by layer: two figures a policy, a panel a pair and model.

    Args:
        groups: All of a sweep that have results; each has frontiers of its own.

    Returns:
        The figures, `frontier_by_width_POLICY` and `frontier_by_layer_POLICY`.
    """
    found = policies([row for group in groups for row in group.cells.rows])
    ways = ((WIDTH, LAYER), (LAYER, WIDTH))
    return [_sweep_frontier(groups, policy, by, other) for by, other in ways for policy in found]


def _sweep_frontier(groups: Sequence[Group], policy: Policy, by: Quantity, other: Quantity) -> Plot:
    entries = [(group, row) for group in groups for row in group.cells.rows if Policy.of(row) == policy]
    shades = _shades(by.value(*entry) for entry in entries)
    shapes = dict(zip(sorted({other.value(*entry) for entry in entries}), cycle(MARKERS), strict=False))
    pairs = list(dict.fromkeys(group.pair for group, _ in entries))
    models = [model for model in MODEL_COLOURS if any(row["model"] == model for _, row in entries)]
    figure = new_figure(WIDE, 2.5 * len(pairs) + 0.9)
    panels = figure.subplots(len(pairs), len(models), squeeze=False)
    for pair, line in zip(pairs, panels, strict=True):
        for model, axes in zip(models, line, strict=True):
            axes.set_title(plain(f"{pair.short(model)} ({model} model)"), loc="left")
            own = [(group, row) for group, row in entries if (group.pair, row["model"]) == (pair, model)]
            for group, rows in groupby(own, key=itemgetter(0)):
                for curve in _curves(row for _, row in rows):
                    colour, shape = shades[by.value(group, curve[0])], shapes[other.value(group, curve[0])]
                    look = {"marker": shape, "markeredgecolor": colour, **FILLS[relation(curve[0])]}
                    _draw(axes, curve, "ce_recovered", colour, markeredgewidth=1, markersize=4.5, **look)
            _finish(axes, [row for _, row in own], "ce_recovered")
    kinds = {relation(row) for _, row in entries}
    handles = [
        *(_mark(shade, "", f"{by.name} {value:,}", "-", linewidth=3) for value, shade in shades.items()),
        *(_mark("#777777", shape, f"{other.name} {value:,}") for value, shape in shapes.items() if len(shapes) > 1),
        *(_mark(BLACK, "o", RELATIONS[r][0], _line(r), **FILLS[r]) for r in RELATIONS if r in kinds),
    ]
    legend_below(figure, handles)
    caption = (
        f"Sparsity against CE recovered, coloured by {by.name}; {policy.words}. Error bars: 95% intervals. Lines join"
        " SAEs of equal settings but sparsity."
    )
    if others := [key for key in groups[0].settings if len({group.settings.get(key) for group in groups}) > 1]:
        caption += f" Curves that differ in {', '.join(others)} look alike: the table of all cells tells them apart."
    return Plot(f"frontier_by_{by.name}_{policy.name}", caption, figure)


def _shades(values: Iterable[int]) -> dict[int, str]:
    """A colour a value, dark to light, so that their order is seen; the lightest end is too light for white paper."""
    distinct = sorted(set(values))
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.8, len(distinct)))
    return dict(zip(distinct, map(to_hex, shades), strict=True))


def _curves(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows of one policy that differ in sparsity only, by L0; what has no place on a frontier stands alone."""
    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        own = (
            (row["sae"],)
            if role(row) == "external"
            else tuple(row[k] for k in ("architecture", "d_sae", "sparsity_key", "seed"))
        )
        # A fine-tuning budget is no point of a frontier.
        alone = row["sae"] if relation(row) in ("finetuned", "control") else ""
        curves.setdefault((row["model"], relation(row), alone, *own), []).append(row)
    for curve in curves.values():
        yield sorted(curve, key=lambda row: number(row, "l0"))


def _draw(axes: Axes, curve: Sequence[Row], metric: str, colour: str, **look: Any) -> None:
    shown, kind = METRICS[metric].shown, relation(curve[0])
    x, y = ([number(row, name) for row in curve] for name in ("l0", metric))
    low, high = ([number(row, f"{metric}_{end}") for row in curve] for end in ("low", "high"))
    below = [shown(max(0.0, v - e)) if math.isfinite(e) else 0.0 for v, e in zip(y, low, strict=True)]
    above = [shown(max(0.0, e - v)) if math.isfinite(e) else 0.0 for v, e in zip(y, high, strict=True)]
    usual = {"marker": RELATIONS[kind][1], "markeredgecolor": "white", "markeredgewidth": 0.4, "markersize": 6}
    axes.errorbar(
        *(x, [shown(v) for v in y], [below, above]),
        color=colour,
        linestyle=_line(kind),
        linewidth=0.9,
        elinewidth=0.8,
        capsize=2,
        markerfacecoloralt="white",
        **(usual | look),
    )


def _finish(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    spread_axis(axes, [METRICS[metric].shown(number(row, metric)) for row in rows])
    l0 = [number(row, "l0") for row in rows if number(row, "l0") > 0]
    if l0 and max(l0) > 10 * min(l0):
        plain_log(axes, "x")
    axes.set_xlabel(AXES["l0"])
    axes.set_ylabel(AXES[metric])


def _line(kind: str) -> Literal["-", "--"]:
    return "-" if kind == "native" else "--"


def _mark(colour: str, marker: str, label: str, line: Literal["-", "--", ""] = "", **more: Any) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label, markerfacecoloralt="white", **more)
