"""The tables of a cross-evaluation, as CSV, Markdown and LaTeX: the post's, its long form with intervals, and the gaps.

Numbers are rounded here and nowhere else, and only for Markdown, LaTeX and the terminal; CSV keeps every digit.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sae_transfer.errors import StudyError
from sae_transfer.study import write_text


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

WITHOUT_GAP = frozenset({"ce_clean", "ce_zero", "ce_mean", "ce_sae"})
"""Three belong to the model alone, so two SAEs have the same; the gap in ce_sae is that in ce_delta."""

CONTEXT = (
    *("section", "sae", "sae_trained_on", "architecture", "d_sae", "sparsity_key", "sparsity_value", "seed"),
    *("hook_name", "dtype", "scale", "norm_scale", "sae_scale", "outliers", "outlier_threshold", "averaging"),
    *("n_tokens", "n_loss_tokens", "n_outliers", "n_sequences"),
)
"""The columns of rows.csv that say what a row is about; `model` is a column of every table already."""

SAE_LABELS = {"base": "Base", "chat": "Chat", "finetuned": "Fine-tuned base"}
CELL_ORDER = (("base", "base"), ("chat", "base"), ("chat", "chat"), ("base", "chat"), ("finetuned", "chat"))
"""(trained on, evaluated on), in the post's order."""

Row = dict[str, str]


@dataclass(frozen=True)
class TableBlock:
    """One table as printed: the cells of one outlier filter and one scale policy."""

    title: str
    table: pd.DataFrame


class _Block(NamedTuple):
    """The rows of rows.csv that share outlier filter and scale policy, in the post's order."""

    rows: list[Row]
    labels: dict[str, str]
    """SAE -> what its cells are headed with."""

    @property
    def policy(self) -> tuple[str, str]:
        return self.rows[0]["outliers"], self.rows[0]["scale"]


class _Line(NamedTuple):
    """One line of a table: as printed, and unrounded with its context, both by column."""

    printed: dict[str, str]
    exact: dict[str, str | float]


def cross_eval_blocks(run: Path) -> list[TableBlock]:
    """The post's table of a run, as printed.

    Args:
        run: A run directory.

    Returns:
        One block an outlier filter and scale policy; excluded comes before kept, matched before raw.

    Raises:
        StudyError: The run has no cross-evaluation, or one that is not readable.
    """
    return [
        TableBlock(f"Cross-evaluation {_circumstances(block)}", _printed(_post_lines(block))) for block in _blocks(run)
    ]


def write_cross_eval_tables(run: Path) -> list[Path]:
    """Write report/tables/{cross_eval,cross_eval_long,transfer}.{csv,md,tex} from a run's cross-evaluation.

    Args:
        run: A run directory; `cross_eval/rows.csv` and `cross_eval/transfer.csv` are read.

    Returns:
        The files written. There is no transfer table when no SAE has a counterpart trained on the other model.

    Raises:
        StudyError: The run has no cross-evaluation, or one that is not readable, or the tables cannot be written.
    """
    blocks = _blocks(run)
    gaps = _read(run, "transfer.csv", ("section", "model", "scale", "outliers", "transferred", "native"))

    def gap_lines(block: _Block) -> list[_Line]:
        return _gap_lines(block, gaps)

    return [
        path
        for name, subject, lines_of in (
            ("cross_eval", "Cross-evaluation", _post_lines),
            ("cross_eval_long", "Every metric with its 95% bootstrap interval", _long_lines),
            ("transfer", "Transferred minus native SAE, paired, with its 95% bootstrap interval", gap_lines),
        )
        for path in _write(run / "report" / "tables" / name, subject, blocks, lines_of)
    ]


def _read(run: Path, name: str, columns: Sequence[str]) -> list[Row]:
    """The lines of a CSV file as text: names such as NA, and numbers as they were written, stay what they are."""
    path = run / "cross_eval" / name
    if not path.exists():
        raise StudyError(f"{path}: not there, the cross-evaluation has not been run", "sae-transfer cross-eval CONFIG")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise StudyError(f"{path}: not readable ({error})", "sae-transfer cross-eval CONFIG --force") from error
    if missing := [column for column in columns if column not in table.columns]:
        raise StudyError(
            f"{path}: lacks the columns {', '.join(missing)}; it was cut short or written by another version",
            "sae-transfer cross-eval CONFIG --force",
        )
    return [dict(zip(table.columns, values, strict=True)) for values in table.itertuples(index=False)]


def _number(row: Row, column: str) -> float:
    return float(row[column] or "nan")


def _blocks(run: Path) -> list[_Block]:
    intervals = [f"{metric}_{end}" for metric in METRICS for end in ("low", "high")]
    rows = _read(run, "rows.csv", (*CONTEXT, "model", *METRICS, *intervals))
    if not rows:
        raise StudyError(f"{run / 'cross_eval' / 'rows.csv'}: has no rows", "sae-transfer cross-eval CONFIG --force")
    labels = _sae_labels(rows)
    ordered = sorted(rows, key=_post_order)
    policies = sorted({(row["outliers"], row["scale"]) for row in rows})
    return [_Block([r for r in ordered if (r["outliers"], r["scale"]) == policy], labels) for policy in policies]


def _is_ours(row: Row) -> bool:
    """Whether the study trained the SAE: then its id says so, `base-standard-w1024-l1_5-s0`; others have a name."""
    return row["sae"].startswith(f"{row['sae_trained_on']}-{row['architecture']}-w{row['d_sae']}-")


def _post_order(row: Row) -> tuple[bool, int]:
    cell = (row["sae_trained_on"], row["model"])
    return not _is_ours(row), CELL_ORDER.index(cell) if cell in CELL_ORDER else len(CELL_ORDER)


def _sae_labels(rows: Iterable[Row]) -> dict[str, str]:
    """What to call each SAE: its role when that is unique, else the role and whatever tells it from its siblings."""
    by_sae = {row["sae"]: row for row in rows}
    labels = {sae: sae for sae in by_sae}
    for role, label in SAE_LABELS.items():
        siblings = {s: _traits(r) for s, r in by_sae.items() if r["sae_trained_on"] == role and _is_ours(r)}
        telling = [len(set(values)) > 1 for values in zip(*siblings.values(), strict=True)]
        found = {s: ", ".join(t for t, tells in zip(ts, telling, strict=True) if tells) for s, ts in siblings.items()}
        if len(set(found.values())) < len(found):
            # Fine-tuned on different budgets, say: only the id tells them apart.
            found = {sae: sae.removeprefix(f"{role}-") for sae in found}
        labels |= {sae: f"{label} ({traits})" if traits else label for sae, traits in found.items()}
    return labels


def _traits(row: Row) -> tuple[str, ...]:
    sparsity = f"{row['sparsity_key'].removesuffix('_coefficient')} {_number(row, 'sparsity_value'):g}"
    return row["architecture"], f"w{row['d_sae']}", sparsity, f"seed {_number(row, 'seed'):g}"


def _circumstances(block: _Block) -> str:
    """Where and how a block's numbers were taken, for its title."""
    first = block.rows[0]
    widths = sorted({int(row["d_sae"]) for row in block.rows})
    excluded = first["outliers"] == "excluded"
    # n_tokens are the positions that count, n_outliers those above the threshold, counted or not.
    n_tokens = f"{int(first['n_tokens']) + excluded * int(first['n_outliers']):,}"
    outliers = "outliers kept"
    if excluded:
        threshold = _per_model(block, "outlier_threshold", lambda text: f"{float(text):g}")
        n_outliers = _per_model(block, "n_outliers", lambda text: f"{int(text):,}")
        outliers = f"outliers excluded above scaled norm {threshold} ({n_outliers} of {n_tokens} positions)"
    return (
        f"at {first['hook_name']}, SAE width{'s' * (len(widths) > 1)} {', '.join(map(str, widths))}, "
        f"{outliers}, {first['scale']} scale, {n_tokens} tokens in {int(first['n_sequences']):,} sequences"
        f"{', averaged by batch' * (first['averaging'] == 'batch')}."
    )


def _per_model(block: _Block, column: str, printed: Callable[[str], str]) -> str:
    """A value that belongs to the model, not to the SAE: once when both models share it, else each with its model."""
    values = {row["model"]: printed(row[column]) for row in block.rows}
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else ", ".join(f"{model} {value}" for model, value in values.items())


def _post_lines(block: _Block) -> list[_Line]:
    lines = []
    for row in block.rows:
        cell = {"SAE": block.labels[row["sae"]], "Model": row["model"].capitalize()}
        values = [(metric, _number(row, name)) for name, metric in POST_METRICS.items()]
        printed = {metric.label: metric.printed(value) for metric, value in values}
        exact = {metric.label: metric.shown(value) for metric, value in values}
        lines.append(_Line(cell | printed, {**cell, **exact, **_context(row)}))
    return lines


def _long_lines(block: _Block) -> list[_Line]:
    lines = []
    for row in block.rows:
        cell = {"SAE": block.labels[row["sae"]], "Model": row["model"].capitalize()}
        for name, metric in METRICS.items():
            values = {"Value": name, "Low": f"{name}_low", "High": f"{name}_high"}
            printed = {head: metric.printed(_number(row, column)) for head, column in values.items()}
            exact = {head: metric.shown(_number(row, column)) for head, column in values.items()}
            of = cell | {"Metric": metric.label}
            lines.append(_Line(of | printed, {**of, **exact, "metric_id": name, **_context(row)}))
    return lines


def _gap_lines(block: _Block, gaps: Sequence[Row]) -> list[_Line]:
    lines = []
    for row in gaps:
        if (row["outliers"], row["scale"]) != block.policy:
            continue
        pair = {
            "Transferred": block.labels[row["transferred"]],
            "Native": block.labels[row["native"]],
            "Model": row["model"].capitalize(),
        }
        context = {"section": row["section"], "scale": row["scale"], "outliers": row["outliers"]}
        ids = {"transferred_id": row["transferred"], "native_id": row["native"]}
        for name, metric in METRICS.items():
            if f"{name}_gap" not in row or name in WITHOUT_GAP:
                continue
            gap, low, high = (_number(row, f"{name}_{end}") for end in ("gap", "low", "high"))
            of = pair | {"Metric": metric.label}
            printed = {"Gap [low, high]": f"{metric.printed(gap)} [{metric.printed(low)}, {metric.printed(high)}]"}
            exact = {"Gap": metric.shown(gap), "Low": metric.shown(low), "High": metric.shown(high)}
            lines.append(_Line(of | printed, {**of, **exact, "metric_id": name, **ids, **context}))
    return lines


def _context(row: Row) -> Row:
    """The other columns of a row. `sae` becomes `sae_id`: many tools do not tell it from the label's column, `SAE`."""
    return {"sae_id" if column == "sae" else column: row[column] for column in CONTEXT}


def _printed(lines: Iterable[_Line]) -> pd.DataFrame:
    return pd.DataFrame([line.printed for line in lines])


def _write(stem: Path, subject: str, blocks: Sequence[_Block], lines_of: Callable[[_Block], list[_Line]]) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".md", ".tex")]
    filled = [(f"{subject} {_circumstances(block)}", lines) for block in blocks if (lines := lines_of(block))]
    if not filled:
        for path in paths:
            # Of an earlier evaluation, which had more SAEs.
            path.unlink(missing_ok=True)
        return []
    exact = pd.DataFrame([line.exact for _, lines in filled for line in lines])
    tables = [TableBlock(title, _printed(lines)) for title, lines in filled]
    texts = (
        exact.to_csv(index=False, lineterminator="\n"),
        "\n".join(map(_markdown, tables)),
        "\n".join(map(_latex, tables)),
    )
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


_TEXT_COLUMNS = frozenset({"SAE", "Model", "Transferred", "Native", "Metric"})


def _markdown(block: TableBlock) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    columns = list(block.table.columns)
    return "\n".join(
        [
            f"**{block.title}**",
            "",
            line(columns),
            line("---" if column in _TEXT_COLUMNS else "---:" for column in columns),
            *(line(cell.replace("|", r"\|") for cell in cells) for cells in block.table.itertuples(index=False)),
            "",
        ]
    )


_LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    # After a line's end, a bare bracket would be read as extra space.
    | {"[": "{[}"}
)

_LATEX_PAGE = 45
"""Lines of a float: a longer one would run off the page."""


def _latex(block: TableBlock) -> str:
    r"""Floats that need `\usepackage{booktabs}` and nothing else; heads are stacked so that ten columns fit a page."""

    def line(cells: Iterable[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    columns = list(block.table.columns)
    lines = [line(cell.translate(_LATEX_ESCAPES) for cell in cells) for cells in block.table.itertuples(index=False)]
    stacks = (textwrap.wrap(column, 7, break_long_words=False) for column in columns)
    heads = (r"\\".join(part.translate(_LATEX_ESCAPES) for part in stack) for stack in stacks)
    head = line(rf"\shortstack{{{text}}}" for text in heads)
    alignment = "".join("l" if column in _TEXT_COLUMNS else "r" for column in columns)
    floats = []
    for start in range(0, len(lines), _LATEX_PAGE):
        caption = block.title.translate(_LATEX_ESCAPES) + " (Continued.)" * (start > 0)
        floats += [
            r"\begin{table}",
            r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            head,
            r"\midrule",
            *lines[start : start + _LATEX_PAGE],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    return "\n".join(floats)
