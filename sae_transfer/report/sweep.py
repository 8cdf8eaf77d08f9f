"""The combined report of a sweep: all rows, tables by pair, frontiers by width and layer, and what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import pandas as pd

from sae_transfer.config import Report
from sae_transfer.report import words
from sae_transfer.report.columns import CONTEXT
from sae_transfer.report.document import Document, Section, write_document
from sae_transfer.report.frontier_figures import sweep_frontiers
from sae_transfer.report.gap_tables import Judgement
from sae_transfer.report.results import TRANSFER, Row
from sae_transfer.report.style import styled
from sae_transfer.report.sweep_results import Cell, Group, ModelPair, Sweep, read_sweep
from sae_transfer.report.sweep_tables import (
    Entry,
    judged,
    missing_table,
    sweep_cross_eval_table,
    sweep_verdict_table,
)
from sae_transfer.report.verdict import rule
from sae_transfer.study import write_text

TOLD_APART = 3
"""Different values of one entry of the cells' manifests that are printed; of more, only how many there are."""


def write_sweep_report(directory: Path, states: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """Write report/{rows,transfer}.csv, report/{tables,figures}/* and report/index.html from what the cells have left.

    Args:
        directory: A sweep's directory; cells that are not done, or damaged, are named in the report.
        states: State and message of each cell, as `sae-transfer status` has them; None where they are not known.

    Returns:
        The page.

    Raises:
        StudyError: There is no list of cells, or the report cannot be written.
    """
    sweep = read_sweep(directory, states or {})
    target = directory / "report"
    for name, columns, rows in (
        ("rows", ("section", "sae", "model", *CONTEXT[2:]), [cell.cells.rows for cell in sweep.cells]),
        ("transfer", TRANSFER, [cell.cells.transfer for cell in sweep.cells]),
    ):
        write_text(target / f"{name}.csv", _csv([*sweep.leading, *columns], chain.from_iterable(rows)))
    groups = sweep.groups()
    verdicts = judged(groups)
    pairs = list(dict.fromkeys(group.pair for group in groups))
    margins = sorted({group.margin for group in groups}) or [Report().margin]
    n_sequences = {int(row["n_sequences"]) for group in groups for row in group.cells.rows}
    document = Document(
        title=f"SAE transfer: a sweep, {directory.resolve().name}",
        introduction=_introduction(sweep, pairs),
        headlines=[headline for pair in pairs for headline in _headlines(pair, verdicts)],
        rule=" ".join(map(rule, margins)),
        seeds_known=any(judgement.noise_floor is not None for _, judgement in verdicts),
        sections=_sections(sweep, groups),
        n_sequences=n_sequences.pop() if len(n_sequences) == 1 else None,
        scale_ratio=None,
        provenance=_provenance(sweep.cells),
    )
    return write_document(document, target)


def _csv(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Lines as text, the given columns first; without any, these alone."""
    lines = list(rows)
    all_columns = list(dict.fromkeys([*columns, *chain.from_iterable(lines)]))
    return pd.DataFrame(lines, columns=all_columns).to_csv(index=False, lineterminator="\n")


def _introduction(sweep: Sweep, pairs: Sequence[ModelPair]) -> list[str]:
    tried = {key: dict.fromkeys(settings[key] for settings in sweep.settings if key in settings) for key in sweep.keys}
    grid = "; ".join(f"{key}: {', '.join(values)}" for key, values in tried.items())
    compared = "; ".join(pair.words for pair in pairs)
    return [
        "Do sparse autoencoders (SAEs) trained on the activations of one model reconstruct those of the other, over a"
        f" grid of studies? {len(sweep.settings)} cells{': ' * bool(grid)}{grid}.",
        *([f"Models: {compared}."] if pairs else []),
    ]


def _headlines(pair: ModelPair, verdicts: Sequence[Entry[Judgement]]) -> list[words.Headline]:
    found = words.headlines([judgement for group, judgement in verdicts if group.pair == pair])
    return [headline._replace(direction=f"{pair.words}: {headline.direction}") for headline in found]


def _sections(sweep: Sweep, groups: Sequence[Group]) -> list[Section]:
    n_cells = len(sweep.settings)
    with styled():
        plots = sweep_frontiers(groups)
    nothing = None if groups else "No cell has results yet."
    verdicts = sweep_verdict_table(groups, sweep.leading)
    unjudged = None if verdicts.printed else "No SAE has a counterpart trained on the other model."
    everything = "All rows: report/rows.csv; all paired gaps: report/transfer.csv."
    return [
        Section(
            "cells",
            "Cells",
            words=[
                f"{len(sweep.cells)} of {n_cells} cells have results."
                + f" Missing: {', '.join(cell.id for cell in sweep.missing)}." * bool(sweep.missing)
            ],
            tables=[missing_table(sweep.missing)],
        ),
        Section("verdict", "Verdict", tables=[verdicts], missing=nothing or unjudged),
        Section("frontiers", "Frontiers", plots=plots, missing=nothing),
        Section(
            "cross-eval",
            "Cross-evaluation",
            words=[everything] if groups else [],
            tables=[sweep_cross_eval_table(groups, sweep.leading)],
            missing=nothing,
        ),
    ]


def _provenance(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """What the manifests of all cells record: once where they agree, else how they differ."""
    recorded = [dict(words.provenance(cell.results)) for cell in cells]
    found = []
    for key in dict.fromkeys(chain.from_iterable(recorded)):
        values = list(dict.fromkeys(of.get(key, "not recorded") for of in recorded))
        if len(values) > TOLD_APART:
            values = [f"{len(values)} different values: cells/*/manifest.json"]
        found.append((key, " | ".join(values)))
    return found
