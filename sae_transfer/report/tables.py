"""The tables of evaluated cells: the post's, its long form with intervals, instruction sections, fine-tuning, budgets.

Numbers are rounded only for Markdown, LaTeX, the page and the terminal; CSV keeps every digit.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sae_transfer.config import UNITS
from sae_transfer.report.cells import Block, blocks, budget, role, settings
from sae_transfer.report.columns import CONTEXT, METRICS, POST_METRICS
from sae_transfer.report.formats import Line, Table, TableBlock
from sae_transfer.report.results import Cells, Results, Row, number, read_cells

BUDGET_METRICS = ("l0", "ce_delta", "ce_recovered", "explained_variance_per_token", "mse")


def cross_eval_blocks(run: Path) -> list[TableBlock]:
    """The post's table of a run, as printed.

    Args:
        run: A run directory.

    Returns:
        One block an outlier filter and scale policy; excluded comes before kept, matched before raw.

    Raises:
        StudyError: The run has no cross-evaluation, or one that is not readable.
    """
    return cross_eval_table(read_cells(run, "cross_eval", "cross-eval")).printed


def cross_eval_table(cells: Cells) -> Table:
    """The post's table: every SAE on both models."""
    return _table("cross_eval", "Cross-evaluation", cells, _post_lines)


def long_table(cells: Cells, name: str = "cross_eval_long") -> Table:
    """Every metric of every cell with its interval."""
    return _table(name, "Every metric with its 95% bootstrap interval", cells, _long_lines)


def instruct_table(cells: Cells) -> Table:
    """The post's table a section of the instruction data."""
    return _table("instruct", "Instruction data,", cells, _post_lines)


def finetune_table(cells: Cells) -> Table:
    """The post's table of fine-tuning: on the chat model without the outlier filter; empty when nothing was fine-tuned.

    Its order is the post's: chat, base, fine-tuned base.
    """
    order = ("chat", "base", "finetuned")
    found = []
    for block in blocks(cells.rows):
        chosen = [row for row in block.rows if row["model"] == "chat" and role(row) in order]
        if block.policy.outliers == "kept" and any(role(row) == "finetuned" for row in chosen):
            part = Block(sorted(chosen, key=lambda row: order.index(role(row))), block.labels)
            found.append((f"Fine-tuning, not ignoring outliers, {part.circumstances()}", _post_lines(part)))
    return Table("finetune", found)


def budget_table(cells: Cells, n_tokens: dict[str, int]) -> Table:
    """Fine-tuned SAEs on the chat model by their budget, beside controls from scratch on the same budgets.

    Args:
        cells: The cross-evaluation.
        n_tokens: SAE -> tokens it was trained on, where that is recorded; else its id tells.

    Returns:
        A line a budget and SAE; the base SAE without fine-tuning comes first, the chat SAE on its full budget last.
    """
    found = []
    for block in blocks(cells.rows):
        lines = []
        for points in budget_curves(block, n_tokens):
            for tokens, row in points:
                cell = {"SAE": block.labels[row["sae"]], "Model": "Chat", "Budget (tokens)": f"{tokens:,}"}
                printed = {METRICS[name].label: METRICS[name].printed(number(row, name)) for name in BUDGET_METRICS}
                exact = {METRICS[name].label: METRICS[name].shown(number(row, name)) for name in BUDGET_METRICS}
                lines.append(Line(cell | printed, {**cell, "Budget (tokens)": tokens, **exact, **_context(row)}))
        if lines:
            title = (
                "Fine-tuning budgets on the chat model; budget 0 is the base SAE as it is, and the chat SAE comes last"
            )
            found.append((f"{title}; {block.circumstances()}", lines))
    return Table("finetune_budget", found)


def budget_curves(block: Block, n_tokens: dict[str, int]) -> list[list[tuple[int, Row]]]:
    """For every setting that was fine-tuned: (tokens, row) on the chat model, by tokens and role.

    Args:
        block: Rows of one policy.
        n_tokens: SAE -> tokens it was trained on, where that is recorded.

    Returns:
        A list a setting; the base SAE has 0 tokens.
    """
    on_chat = [row for row in block.rows if row["model"] == "chat" and role(row) != "external"]
    order = ("base", "finetuned", "control", "chat")
    curves = []
    for setting in dict.fromkeys(settings(row) for row in on_chat if role(row) == "finetuned"):
        rows = [row for row in on_chat if settings(row) == setting]
        points = [(0 if role(row) == "base" else n_tokens.get(row["sae"]) or _count(budget(row)), row) for row in rows]
        # The chat SAE on its full budget is the reference, whatever that budget was.
        last = [role(row) == "chat" for row in rows]
        keyed = sorted(zip(last, points, strict=True), key=lambda p: (p[0], p[1][0], order.index(role(p[1][1]))))
        curves.append([point for _, point in keyed])
    return curves


def trained_tokens(results: Results) -> dict[str, int]:
    """SAE -> tokens it was trained on, of those trained in this run."""
    return {log.sae: int(log.provenance.get("tokens") or 0) for log in results.training}


def _count(text: str) -> int:
    """`50k` as a number of tokens; 0 when it is none."""
    match = re.fullmatch(r"([\d.]+)([kMB]?)", text)
    return round(float(match[1]) * UNITS[match[2]]) if match else 0


def _table(name: str, subject: str, cells: Cells, lines_of: Callable[[Block], list[Line]]) -> Table:
    return Table(name, [(f"{subject} {block.circumstances()}", lines_of(block)) for block in blocks(cells.rows)])


def _post_lines(block: Block) -> list[Line]:
    return [post_line({"SAE": block.labels[row["sae"]], "Model": row["model"].capitalize()}, row) for row in block.rows]


def post_line(head: Mapping[str, str], row: Row) -> Line:
    """The post's columns of a row, after those that say whose they are."""
    values = [(metric, number(row, name)) for name, metric in POST_METRICS.items()]
    printed = {metric.label: metric.printed(value) for metric, value in values}
    exact = {metric.label: metric.shown(value) for metric, value in values}
    return Line({**head, **printed}, {**head, **exact, **_context(row)})


def _long_lines(block: Block) -> list[Line]:
    lines = []
    for row in block.rows:
        cell = {"SAE": block.labels[row["sae"]], "Model": row["model"].capitalize()}
        for name, metric in METRICS.items():
            values = {"Value": name, "Low": f"{name}_low", "High": f"{name}_high"}
            printed = {head: metric.printed(number(row, column)) for head, column in values.items()}
            exact = {head: metric.shown(number(row, column)) for head, column in values.items()}
            of = cell | {"Metric": metric.label}
            lines.append(Line(of | printed, {**of, **exact, "metric_id": name, **_context(row)}))
    return lines


def _context(row: Row) -> Row:
    """The other columns of a row. `sae` becomes `sae_id`: many tools do not tell it from the label's column, `SAE`."""
    return {"sae_id" if column == "sae" else column: row[column] for column in CONTEXT}
