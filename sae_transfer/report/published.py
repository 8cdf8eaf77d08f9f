"""The post's published numbers beside ours, for a study of one of its three pairs at its site."""

import json
import re
from importlib.resources import files
from typing import Any

from sae_transfer.config import Study
from sae_transfer.report.cells import SECTIONS, Block, blocks, role
from sae_transfer.report.columns import POST_METRICS
from sae_transfer.report.formats import Line, Table
from sae_transfer.report.outlier_tables import outlier_table
from sae_transfer.report.results import Results, Row, number

SUBJECTS = {"cross_eval": "Cross-evaluation", "finetune": "Fine-tuning", "instruct": "Instruction data"}
OUTLIER_HEADS: tuple[str, ...] = ("Outlier threshold", "Frac outliers", "Breakdown")
Published = dict[str, Any]


def published() -> Published:
    """All published numbers with their source; `results/published/` holds the same file.

    Returns:
        source; pairs; cells, as in rows.csv (`printed`: from the post's table, which truncates; else unrounded);
        outliers.
    """
    return json.loads(files("sae_transfer.report").joinpath("published.json").read_text(encoding="utf-8"))


def same_site(one: str, other: str) -> bool:
    """Whether two hook names are one site: `blocks.8.hook_resid_post` is `blocks.9.hook_resid_pre`."""

    def canonical(hook_name: str) -> str:
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_name)
        return f"blocks.{int(match[1]) + 1}.hook_resid_pre" if match else hook_name

    return canonical(one) == canonical(other)


def find_pair(study: Study | None) -> str | None:
    """Which of the post's pairs a study is about, by its model ids and site; None for any other."""
    if study is None:
        return None
    asked = (study.pair.base.lower(), study.pair.chat.lower())
    for name, pair in published()["pairs"].items():
        if asked == (pair["base"].lower(), pair["chat"].lower()) and same_site(study.site.hook_name, pair["hook_name"]):
            return name
    return None


def published_table(results: Results) -> Table:
    """Published, ours and the difference, for every published cell that this run has too; empty for other pairs.

    Our cells are those under `matched` scale, the post's policy; SAEs from elsewhere count as their `trained_on`.
    """
    pair = find_pair(results.study)
    cells = [cell for cell in published()["cells"] if cell["pair"] == pair]
    rows = [row for found in (results.cross_eval, results.instruct) if found for row in found.rows]
    ours = [block for block in blocks(rows) if block.policy.scale == "matched"]
    found = []
    for table, section in dict.fromkeys((cell["table"], cell["section"]) for cell in cells):
        lines = [
            line
            for cell in cells
            if (cell["table"], cell["section"]) == (table, section)
            for block in ours
            if (block.policy.section, block.policy.outliers) == (section, cell["outliers"])
            for row in block.rows
            if _is_counterpart(row, cell)
            for line in _three_lines(block, row, cell)
        ]
        title = f"{SUBJECTS[table]}, {SECTIONS[section]}: the post's numbers, ours, and ours minus the post's."
        found.append((title, lines))
    return Table("published", found)


def published_outlier_table(results: Results) -> Table:
    """The post's outliers of each model beside ours; empty for other pairs."""
    pair = find_pair(results.study)
    ours = {line.printed["Model"].lower(): line for _, block in outlier_table(results).blocks for line in block}
    lines = []
    for theirs in published()["outliers"]:
        line = ours.get(theirs["model"])
        if theirs["pair"] != pair or line is None:
            continue
        post = Line(
            {
                "Outlier threshold": f"{theirs['threshold']:g}",
                "Frac outliers": f"{theirs['fraction']:.6f}",
                "Breakdown": theirs["breakdown"],
            },
            dict(zip(OUTLIER_HEADS, (theirs["threshold"], theirs["fraction"], theirs["breakdown"]), strict=True)),
        )
        for source, of in (("post", post), ("ours", line)):
            where = {"Model": line.printed["Model"], "Source": source}
            printed = {head: of.printed[head] for head in OUTLIER_HEADS}
            exact = {head: of.exact[head] for head in OUTLIER_HEADS}
            lines.append(Line(where | printed, {**where, **exact}))
    return Table("published_outliers", [("Outliers: the post's table and ours.", lines)])


def _is_counterpart(row: Row, cell: Published) -> bool:
    trained_on_it = row["sae_trained_on"] == cell["sae_trained_on"] and role(row) != "control"
    return trained_on_it and row["model"] == cell["model"]


def _three_lines(block: Block, row: Row, cell: Published) -> list[Line]:
    theirs = {name: float(cell[name]) for name in POST_METRICS if name != "ce_delta"}
    theirs["ce_delta"] = theirs["ce_sae"] - theirs["ce_clean"]
    ours = {name: number(row, name) for name in POST_METRICS}
    difference = {name: ours[name] - theirs[name] for name in POST_METRICS}
    source = "post (table, truncated)" if cell["printed"] else "post"
    lines = []
    for label, values in ((source, theirs), ("ours", ours), ("difference", difference)):
        of = {"SAE": block.labels[row["sae"]], "Model": row["model"].capitalize(), "Source": label}
        printed = {metric.label: metric.printed(values[name]) for name, metric in POST_METRICS.items()}
        exact = {metric.label: metric.shown(values[name]) for name, metric in POST_METRICS.items()}
        more = {"sae_id": row["sae"], "section": row["section"], "outliers": row["outliers"], "width": row["d_sae"]}
        lines.append(Line(of | printed, {**of, **exact, **more}))
    return lines
