"""The figures of outliers: norms by kind, error against norm, and every metric against the threshold."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sae_transfer.report.columns import AXES, METRICS
from sae_transfer.report.outlier_tables import KINDS
from sae_transfer.report.results import NormBin, Position, Results, Row, number
from sae_transfer.report.style import (
    BLACK,
    BLUE,
    GREEN,
    MODEL_COLOURS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDE,
    Plot,
    label_points,
    legend_below,
    new_figure,
    plain,
    plain_log,
    spread_axis,
)

KIND_STYLES = {
    "other": (SKY, ".", "-"),
    "early": (PURPLE, "D", (0, (5, 1, 1, 1))),
    "newline": (ORANGE, "v", "--"),
    "first_newline": (VERMILLION, "^", "-."),
    "paragraph": (GREEN, "P", ":"),
    "bos_later": (BLUE, "s", (0, (3, 1))),
    "bos_first": (BLACK, "X", "-"),
}
"""Kind -> colour, marker, line; the rarest kinds are drawn last, on top."""

N_LABELLED = 8
SWEEP_PANELS = ("l0", "ce_delta", "ce_recovered", "explained_variance_per_token", "mse")


def norm_histogram(results: Results) -> list[Plot]:
    """How often which norms occur, by kind; a panel a model, both axes logarithmic."""
    bins = [found for found in results.norm_histogram if found.n_positions]
    if not bins:
        return []
    models = [model for model in MODEL_COLOURS if any(found.model == model for found in bins)]
    thresholds = {row["model"]: number(row, "threshold") for row in results.outlier_kinds}
    figure = new_figure(WIDE, 3.0)
    all_axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(all_axes, models, strict=True):
        for kind, (colour, _, line) in KIND_STYLES.items():
            part = sorted(found for found in bins if (found.model, found.kind) == (model, kind))
            if part:
                _steps(axes, part, colour, line)
        if math.isfinite(thresholds.get(model, math.nan)):
            axes.axvline(thresholds[model], color=BLACK, linestyle="--", linewidth=0.8)
        plain_log(axes, "x")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.set_title(f"{model} model", loc="left")
        axes.set_xlabel("Scaled norm")
    all_axes[0].set_ylabel("Positions in a bin")
    handles = _kind_handles({found.kind for found in bins}, marked=False)
    handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=0.8, label="outlier threshold"))
    legend_below(figure, handles)
    caption = "Scaled norms of all evaluated positions by kind, with the outlier threshold."
    return [Plot("norm_histogram", caption, figure)]


def _kind_handles(present: set[str], *, marked: bool) -> list[Line2D]:
    """The legend of kinds, by marker or by line."""
    looks: dict[str, dict[str, Any]] = {
        kind: {"marker": m, "linestyle": ""} if marked else {"linestyle": line}
        for kind, (_, m, line) in KIND_STYLES.items()
    }
    return [
        Line2D([], [], color=KIND_STYLES[k][0], label=KINDS[k], **looks[k])
        for k in reversed(KIND_STYLES)
        if k in present
    ]


def _steps(axes: Axes, bins: Sequence[NormBin], colour: str, line: Any) -> None:
    """Bins as an outline, down to the axis where a neighbour is empty."""
    floor = 0.1  # below the axis, which is logarithmic
    x, y = [bins[0].low], [floor]
    for found in bins:
        if not math.isclose(found.low, x[-1]):
            x += [x[-1], found.low]
            y += [floor, floor]
        x += [found.low, found.high]
        y += [found.n_positions, found.n_positions]
    axes.plot([*x, x[-1]], [*y, floor], color=colour, linestyle=line, linewidth=1.1)


def error_by_norm(results: Results) -> list[Plot]:
    """Squared error against scaled norm, an SAE on the opposite model; a figure a setting, a panel a model."""
    positions = [p for p in results.error_by_norm if p.squared_error > 0 and p.scaled_norm > 0]
    settings = list(dict.fromkeys(_setting(position.sae) for position in positions))
    found = []
    for setting in settings:
        part = [position for position in positions if _setting(position.sae) == setting]
        panels = list(dict.fromkeys((position.sae, position.model) for position in part))
        chosen = [[p for p in part if (p.sae, p.model) == panel] for panel in panels]
        figure = new_figure(WIDE, 3.6)
        all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (sae, model), shown in zip(all_axes, panels, chosen, strict=True):
            _error_panel(axes, shown)
            whose = sae if sae == setting else f"{sae.partition('-')[0]} SAE"
            axes.set_title(plain(f"{whose} on {model} model"), loc="left")
        all_axes[0].set_ylabel("Squared error of a position (scaled units)")
        legend_below(figure, _kind_handles({position.kind for position in part}, marked=True))
        for axes, shown in zip(all_axes, chosen, strict=True):
            _label_worst(axes, shown)
        suffix = f"_{setting}" if len(settings) > 1 else ""
        caption = (
            f"Error against norm with the opposite model's SAE ({setting}): all outliers and a random sample of the"
            " other positions; the tokens with the largest errors are named."
        )
        found.append(Plot(f"error_by_norm{suffix}", caption, figure))
    return found


def _setting(sae: str) -> str:
    """Base and chat SAE of equal settings share it; an SAE from elsewhere has a figure of its own."""
    return sae.partition("-")[2] if sae.startswith(("base-", "chat-")) else sae


def _error_panel(axes: Axes, positions: Sequence[Position]) -> None:
    for kind, (colour, marker, _) in KIND_STYLES.items():
        part = [(p.scaled_norm, p.squared_error) for p in positions if p.kind == kind]
        small = kind == "other"
        axes.scatter(
            *(zip(*part, strict=True) if part else ([], [])),
            s=5 if small else 16,
            color=colour,
            marker=marker,
            alpha=0.5 if small else 0.85,
            linewidths=0,
            rasterized=True,  # thousands of points would make the SVG heavy
        )
    axes.set_yscale("log")
    axes.margins(0.08, 0.14)  # room for labels
    norms = [position.scaled_norm for position in positions]
    if max(norms) > 20 * min(norms):
        plain_log(axes, "x")
    axes.set_xlabel("Scaled norm")


def _label_worst(axes: Axes, positions: Sequence[Position]) -> None:
    """Name the largest errors, each token once."""
    worst: dict[str, Position] = {}
    for position in sorted(positions, key=lambda p: -p.squared_error):
        worst.setdefault(position.token, position)
    named = list(worst.values())[:N_LABELLED]
    points = np.array([(position.scaled_norm, position.squared_error) for position in named])
    label_points(axes, points, [_shortened(position.token) for position in named])


def _shortened(token: str) -> str:
    return plain(token if len(token) <= 14 else f"{token[:12]}…")


def threshold_sweep(results: Results) -> list[Plot]:
    """The fraction removed and the metrics against the threshold; colour by model, line by native or transferred."""
    rows = results.threshold_sweep
    if not rows:
        return []
    figure = new_figure(WIDE, 4.4)
    panels = figure.subplots(2, 3).flat
    for axes, metric in zip(panels, ("fraction_removed", *SWEEP_PANELS), strict=True):
        _sweep_panel(axes, rows, metric)
        axes.set_xlabel("Outlier threshold (scaled norm)")
    kinds = sorted({(row["model"], _is_native(row)) for row in rows}, key=lambda kind: (kind[0], not kind[1]))
    handles = [
        Line2D(
            [],
            [],
            color=MODEL_COLOURS[m],
            linestyle="-" if native else "--",
            marker="o" if native else "X",
            label=label,
        )
        for m, native in kinds
        for label in [f"{'native' if native else 'transferred'} SAE on {m} model"]
    ]
    legend_below(figure, handles, columns=2)
    caption = "The share of positions removed as outliers, and the metrics of what remains, against the threshold."
    return [Plot("thresholds", caption, figure)]


def _is_native(row: Row) -> bool:
    return row.get("sae_trained_on") == row["model"]


def _sweep_panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    removed = metric == "fraction_removed"
    values = []
    for sae, model in dict.fromkeys((row["sae"], row["model"]) for row in rows):
        part = sorted((r for r in rows if (r["sae"], r["model"]) == (sae, model)), key=lambda r: number(r, "threshold"))
        native = _is_native(part[0])
        y = [100 * number(row, metric) if removed else METRICS[metric].shown(number(row, metric)) for row in part]
        values += y
        if removed and not native and any(_is_native(row) and row["model"] == model for row in rows):
            continue  # which positions go depends on the model alone
        axes.plot(
            *([number(row, "threshold") for row in part], y),
            color=MODEL_COLOURS[model],
            linestyle="-" if native else "--",
            marker="o" if native else "X",
            markersize=3,
            linewidth=1.8 if model == "base" else 0.9,  # where two coincide both are seen
        )
    plain_log(axes, "x")
    axes.set_ylabel("Positions removed (%)" if removed else AXES[metric])
    if removed:
        positive = [value for value in values if value > 0]
        axes.set_yscale("symlog", linthresh=min(positive, default=1.0))
        axes.set_ylim(bottom=0)
    else:
        spread_axis(axes, values)
