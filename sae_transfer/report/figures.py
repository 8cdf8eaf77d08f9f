"""The figures of evaluated cells and of training: CE bars, fine-tuning budgets, training curves."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from sae_transfer.config import SIDES
from sae_transfer.report.cells import SECTIONS, blocks, budget, is_native, role, traits
from sae_transfer.report.columns import AXES, METRICS
from sae_transfer.report.results import Cells, Results, Row, TrainingLog, number
from sae_transfer.report.style import (
    BLACK,
    GREEN,
    LINES,
    MODEL_COLOURS,
    PURPLE,
    WIDE,
    Plot,
    legend_below,
    new_figure,
    plain,
    plain_log,
    token_axis,
)
from sae_transfer.report.tables import budget_curves

RELATIONS = {
    "native": ("native SAE", "o", ""),
    "transferred": ("transferred SAE", "X", "//"),
    "finetuned": ("fine-tuned base SAE", "^", ".."),
    "control": ("chat SAE from scratch", "v", "xx"),
}
"""How an SAE stands to the model: label, marker, hatch."""


def relation(row: Row) -> str:
    """How an SAE stands to the model it is evaluated on."""
    if role(row) in ("finetuned", "control"):
        return role(row)
    return "native" if is_native(row) else "transferred"


def ce_bars(cells: Cells) -> list[Plot]:
    """SAE CE of every SAE with clean and zero-ablation CE as lines; one figure a policy, one panel a model."""
    found = []
    for block in blocks(cells.rows):
        panels = [(f"{m} model", [row for row in block.rows if row["model"] == m]) for m in SIDES]
        found.append(_bars(f"ce_bars_{block.policy.name}", panels, block.labels, f"{block.circumstances()}"))
    return found


def instruct_bars(cells: Cells) -> list[Plot]:
    """The same for the sections of the instruction data, on the chat model; one figure a policy."""
    found = []
    grouped = blocks(cells.rows)
    for policy in dict.fromkeys(block.policy._replace(section="") for block in grouped):
        parts = [block for block in grouped if block.policy._replace(section="") == policy]
        panels = [(f"{SECTIONS[part.policy.section]}, {part.rows[0]['model']} model", part.rows) for part in parts]
        where = f"on instruction data, {policy.words}."
        found.append(_bars(f"instruct_ce_bars_{policy.name}", panels, parts[0].labels, where))
    return found


def _bars(name: str, panels: Sequence[tuple[str, list[Row]]], labels: dict[str, str], where: str) -> Plot:
    panels = [(title, rows) for title, rows in panels if rows]
    heights = [len(rows) + 0.6 for _, rows in panels]
    figure = new_figure(WIDE, 0.21 * sum(heights) + 0.3 * len(panels) + 0.7)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    rows = [row for _, part in panels for row in part]
    # One SAE far worse than no layer at all would flatten the others: its bar is cut and its value printed.
    zero = max(number(row, "ce_zero") for row in rows)
    limit = 1.2 * max([zero, *(number(row, "ce_sae") for row in rows if number(row, "ce_sae") < 2 * zero)])
    for axes, (title, part) in zip(all_axes, panels, strict=True):
        axes.set_title(title, loc="left")
        for line, colour, style in (("ce_clean", BLACK, ":"), ("ce_zero", PURPLE, "--")):
            axes.axvline(number(part[0], line), color=colour, linestyle=style, zorder=3)
        for place, row in enumerate(part):
            value, colour = number(row, "ce_sae"), MODEL_COLOURS[row["model"]]
            axes.barh(
                place,
                min(value, limit),
                0.72,
                facecolor=_tint(row),
                edgecolor=colour,
                hatch=RELATIONS[relation(row)][2],
            )
            low, high = number(row, "ce_sae_low"), number(row, "ce_sae_high")
            if math.isfinite(low) and high < limit:
                axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=BLACK, capsize=2, linewidth=0.8)
            cut = value > limit
            end = limit if cut else max(value, high if math.isfinite(high) else value)
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            axes.annotate(
                *(METRICS["ce_sae"].printed(value) + " →" * cut, (end, place)),
                xytext=(-4, 0) if cut else (4, 0),
                textcoords="offset points",
                ha="right" if cut else "left",
                va="center",
                bbox=box,
                zorder=4,
            )
        axes.set_yticks(range(len(part)), [plain(labels[row["sae"]]) for row in part])
        axes.set_ylim(len(part) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, limit)
    all_axes[-1].set_xlabel("Next-token cross-entropy (nats)")
    present = dict.fromkeys(relation(row) for row in rows)
    legend_below(
        figure,
        [
            Line2D([], [], color=BLACK, linestyle=":", label="clean model"),
            Line2D([], [], color=PURPLE, linestyle="--", label="zero ablation"),
            *(
                Patch(facecolor="white", edgecolor=BLACK, hatch=h, label=text)
                for r, (text, _, h) in RELATIONS.items()
                if r in present
            ),
        ],
        columns=3,
    )
    caption = f"Cross-entropy with each SAE spliced in, {where} Lines: clean model, zero ablation; error bars: 95%."
    return Plot(name, caption, figure)


def _tint(row: Row) -> tuple[float, float, float]:
    """The model's colour, light enough for a hatch and an error bar to be seen on it."""
    colour = MODEL_COLOURS[row["model"]]
    return tuple(0.55 + 0.45 * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # pyright: ignore[reportReturnType]


def finetune_budgets(cells: Cells, n_tokens: dict[str, int]) -> list[Plot]:
    """CE delta and L0 on the chat model against the fine-tuning budget; a figure a policy, two panels a setting."""
    found = []
    for block in blocks(cells.rows):
        curves = budget_curves(block, n_tokens)
        if not curves:
            continue
        figure = new_figure(WIDE, 2.2 * len(curves) + 0.6)
        all_axes = figure.subplots(len(curves), 2, squeeze=False)
        for line, curve in zip(all_axes, curves, strict=True):
            for axes, metric in zip(line, ("ce_delta", "l0"), strict=True):
                _budget_panel(axes, curve, metric)
            if len(curves) > 1:
                line[0].set_title(plain(", ".join(filter(None, traits(curve[0][1])))), loc="left")
        for axes in all_axes[-1]:
            axes.set_xlabel("Budget (tokens)")
        handles = {handle.get_label(): handle for axes in all_axes.flat for handle in axes.get_lines()}
        legend_below(figure, [h for label, h in handles.items() if not str(label).startswith("_")], columns=2)
        caption = (
            f"Fine-tuning the base SAE on the chat model, {block.circumstances()} Each budget is a schedule of its own;"
            " bands and bars: 95%."
        )
        found.append(Plot(f"finetune_budget_{block.policy.name}", caption, figure))
    return found


def _budget_panel(axes: Axes, curve: Sequence[tuple[int, Row]], metric: str) -> None:
    shown = METRICS[metric].shown
    styles = {
        "finetuned": ("fine-tuned base SAE", GREEN, "^", "-"),
        "control": ("chat SAE from scratch, same budget", PURPLE, "v", "--"),
    }
    for who, (label, colour, marker, line) in styles.items():
        points = [(tokens, row) for tokens, row in curve if role(row) == who and tokens]
        if not points:
            continue
        y = [shown(number(row, metric)) for _, row in points]
        ends = [[shown(number(row, f"{metric}_{end}")) for _, row in points] for end in ("low", "high")]
        errors = [[abs(v - e) if math.isfinite(e) else 0.0 for v, e in zip(y, end, strict=True)] for end in ends]
        x = [tokens for tokens, _ in points]
        axes.errorbar(x, y, errors, color=colour, linestyle="none", elinewidth=0.8, capsize=2)
        axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=label)
    references = {
        "base": ("base SAE, not fine-tuned", MODEL_COLOURS["base"], ":"),
        "chat": ("chat SAE, full budget", MODEL_COLOURS["chat"], "-."),
    }
    for who, (label, colour, line) in references.items():
        for row in [row for _, row in curve if role(row) == who]:
            axes.axhline(shown(number(row, metric)), color=colour, linestyle=line, label=label)
            low, high = (shown(number(row, f"{metric}_{end}")) for end in ("low", "high"))
            if math.isfinite(low):
                axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    budgets = {tokens: budget(row) for tokens, row in curve if role(row) in styles and tokens}
    axes.set_xticks(list(budgets), list(budgets.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(AXES[metric])


def training_curves(results: Results) -> list[Plot]:
    """Loss, L0 and explained variance against tokens; fine-tuned SAEs and their controls in a figure of their own."""
    tuned = [log for log in results.training if _role_of(log) != "trained"]
    trained = [log for log in results.training if _role_of(log) == "trained"]
    captions = (
        ("training", trained, "Training of the SAEs."),
        (
            "finetune_training",
            tuned,
            "Fine-tuning of the base SAEs, and chat SAEs from scratch on the same budgets (controls).",
        ),
    )
    return [
        _curves(name, logs, f"{caption} As logged in training; norms scaled.")
        for name, logs, caption in captions
        if logs
    ]


def _role_of(log: TrainingLog) -> str:
    return str(log.provenance.get("role", "trained"))


def _curves(name: str, logs: Sequence[TrainingLog], caption: str) -> Plot:
    colours = dict(MODEL_COLOURS)
    if name != "training":
        colours = {"finetuned": GREEN, "chat": PURPLE}
    styles: dict[str, int] = {}
    figure = new_figure(WIDE, 2.5 + 0.17 * math.ceil(len(logs) / 2))
    panels = (
        ("loss", "Loss (scaled units)", 1),
        ("l0", AXES["l0"], 1),
        ("explained_variance", AXES["explained_variance_per_token"], 100),
    )
    all_axes = figure.subplots(1, 3)
    handles = []
    # Thin lines last, so that where two coincide both are seen.
    ordered = sorted(logs, key=lambda log: (log.provenance["trained_on"] == "chat", log.provenance.get("tokens") or 0))
    for log in ordered:
        trained_on = str(log.provenance["trained_on"])
        setting = log.sae.partition("-")[2]
        # SAEs of equal settings share a dash pattern, those of one model a colour.
        style = styles.setdefault(setting, len(styles))
        width = (0.8 if trained_on == "chat" else 1.7) + 0.4 * (style // len(LINES))
        look: dict[str, Any] = {
            "color": colours.get(trained_on, BLACK),
            "linestyle": LINES[style % len(LINES)],
            "linewidth": width,
        }
        for axes, (column, _, factor) in zip(all_axes, panels, strict=True):
            points = [(step["tokens"], factor * step[column]) for step in log.steps if step.get(column) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), **look)
        handles.append(Line2D([], [], label=plain(log.sae), **look))
    for axes, (column, label, _) in zip(all_axes, panels, strict=True):
        token_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylabel(label)
        if column != "explained_variance":
            plain_log(axes, "y")
    legend_below(figure, handles, columns=2)
    return Plot(name, caption, figure)
