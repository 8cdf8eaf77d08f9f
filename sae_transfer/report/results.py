"""What a run directory holds, read for the report. A stage that is absent reads as None or as empty."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from pydantic import ValidationError

from sae_transfer.config import Study
from sae_transfer.errors import StudyError
from sae_transfer.report.columns import CONTEXT, METRICS
from sae_transfer.study import refuse_newer

Row = dict[str, str]

TRANSFER = ("section", "model", "scale", "outliers", "transferred", "native")
SEEDS = ("section", "model", "scale", "outliers", "first", "second")


NAMED = 5
"""Columns that a message names before it only counts them."""


def number(row: Row, column: str) -> float:
    """A value of a row; NaN where it is empty or the row has no such column."""
    return float(row.get(column) or "nan")


def read_lines(run: Path, stage: str, name: str, columns: Sequence[str], verb: str) -> list[Row]:
    """The lines of a CSV file as text: names such as NA, and numbers as they were written, stay what they are.

    Args:
        run: A run directory.
        stage: The stage's directory in it.
        name: The file's name.
        columns: What it must hold.
        verb: Of the command line, that makes it.

    Returns:
        A mapping a line.

    Raises:
        StudyError: It is not there, not readable, or lacks columns.
    """
    path = run / stage / name
    again = f"sae-transfer {verb} CONFIG --force"
    if not path.exists():
        raise StudyError(f"{path}: not there, {verb} has not been run", f"sae-transfer {verb} CONFIG")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise StudyError(f"{path}: not readable ({error})", again) from error
    if missing := [column for column in columns if column not in table.columns]:
        names = ", ".join(missing[:NAMED]) + f" and {len(missing) - NAMED} more" * (len(missing) > NAMED)
        raise StudyError(f"{path}: lacks the columns {names}; it was cut short or written by another version", again)
    return [dict(zip(table.columns, values, strict=True)) for values in table.itertuples(index=False)]


class Cells(NamedTuple):
    """One stage's evaluation of SAEs on models: rows, paired gaps, and gaps between seeds."""

    rows: list[Row]
    transfer: list[Row]
    seeds: list[Row]


def read_cells(run: Path, stage: str, verb: str) -> Cells:
    """Read what cross_eval/ and instruct/ hold.

    Args:
        run: A run directory.
        stage: Which of the two.
        verb: Of the command line, that makes it.

    Returns:
        Its rows and gaps.

    Raises:
        StudyError: It is not there or not readable.
    """
    intervals = [f"{metric}_{end}" for metric in METRICS for end in ("low", "high")]
    rows = read_lines(run, stage, "rows.csv", (*CONTEXT, "model", *METRICS, *intervals), verb)
    if not rows:
        raise StudyError(f"{run / stage / 'rows.csv'}: has no rows", f"sae-transfer {verb} CONFIG --force")
    transfer = read_lines(run, stage, "transfer.csv", TRANSFER, verb)
    seeds = read_lines(run, stage, "seeds.csv", SEEDS, verb) if (run / stage / "seeds.csv").exists() else []
    return Cells(rows, transfer, seeds)


@dataclass(frozen=True)
class TrainingLog:
    """The training of one SAE: its provenance, and its log, a mapping a logged step."""

    sae: str
    provenance: dict[str, Any]
    steps: list[dict[str, Any]]


class NormBin(NamedTuple):
    """A bin of a histogram of scaled norms."""

    model: str
    kind: str
    low: float
    high: float
    n_positions: int


class Position(NamedTuple):
    """A position as an SAE reconstructs it."""

    model: str
    sae: str
    kind: str
    token: str
    scaled_norm: float
    squared_error: float


class WeightPart(NamedTuple):
    """The weights of one kind in one layer, or outside the layers."""

    kind: str
    layer: int | None
    n_parameters: int
    norm_base: float
    norm_difference: float
    relative_difference: float
    """NaN where the base model's norm is zero."""


class Results:
    """A run directory's results, each file read when it is first asked for."""

    def __init__(self, run: Path) -> None:
        """Wrap a path; no result is read.

        Args:
            run: A run directory.

        Raises:
            StudyError: A newer version wrote it.
        """
        refuse_newer(run)
        self.run = run

    @property
    def empty(self) -> bool:
        """Whether no stage has left anything to show."""
        anything = (self.cross_eval, self.instruct, self.outlier_kinds, self.weights_by_kind, self.training)
        return not any(anything)

    @cached_property
    def study(self) -> Study | None:
        """The study as resolved; None when the directory has none."""
        path = self.run / "study.yaml"
        if not path.exists():
            return None
        try:
            return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValidationError, yaml.YAMLError) as error:
            raise StudyError(
                f"{path}: not readable, it was changed or written by another version ({error})",
                "sae-transfer run CONFIG, which writes it anew",
            ) from error

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Where the numbers come from; empty when the directory has none."""
        return self._json("manifest.json") or {}

    @cached_property
    def scales(self) -> dict[str, Any]:
        """Norm scaling factors and what they were measured on."""
        return self._json("scales.json") or {}

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The records of finished stages, in the order they were finished."""
        records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in self.run.glob("stages/*.json")}
        return dict(sorted(records.items(), key=lambda item: (item[1]["finished"], item[0])))

    @cached_property
    def cross_eval(self) -> Cells | None:
        """Every SAE on both models over the evaluation tokens."""
        return self._cells("cross_eval", "cross-eval")

    @cached_property
    def instruct(self) -> Cells | None:
        """The same over the sections of instructions and answers."""
        return self._cells("instruct", "instruct")

    @cached_property
    def instruct_summary(self) -> dict[str, Any]:
        """How many instructions were drawn, dropped and used."""
        return self._json("instruct/summary.json") or {}

    @cached_property
    def outlier_kinds(self) -> list[Row]:
        """A row a (model, kind)."""
        columns = ("model", "threshold", "threshold_source", "n_tokens", "n_outliers", "fraction", "kind", "share")
        return self._lines("outliers", "rows.csv", columns)

    @cached_property
    def outlier_tokens(self) -> list[Row]:
        """The most frequent tokens among the outliers."""
        columns = ("model", "kind", "token_id", "token", "count", "mean_norm", "max_norm")
        return self._lines("outliers", "tokens.csv", columns)

    @cached_property
    def norm_histogram(self) -> list[NormBin]:
        """Scaled norms of all positions by kind."""
        columns = ("model", "kind", "low", "high", "count")
        return [
            NormBin(row["model"], row["kind"], number(row, "low"), number(row, "high"), int(row["count"]))
            for row in self._lines("outliers", "histogram.csv", columns)
        ]

    @cached_property
    def threshold_sweep(self) -> list[Row]:
        """Every metric at each of several thresholds."""
        return self._lines("outliers", "thresholds.csv", ("threshold", "sae", "model", "fraction_removed"))

    @cached_property
    def error_by_norm(self) -> list[Position]:
        """Squared error and norm of positions, an SAE on the opposite model."""
        return [
            Position(
                *(row["model"], row["sae"], row["kind"], row["token"]),
                *(number(row, "scaled_norm"), number(row, "squared_error")),
            )
            for row in self._lines("outliers", "scatter.csv", Position._fields)
        ]

    @cached_property
    def auto_threshold(self) -> dict[str, Any]:
        """How `outlier_threshold: auto` chose."""
        return self._json("outliers/auto.json") or {}

    @cached_property
    def weights_by_kind(self) -> list[WeightPart]:
        """How far the two models' weights are apart, by layer and kind."""
        norms = ("norm_base", "norm_difference", "relative_difference")
        return [
            WeightPart(
                *(row["kind"], int(number(row, "layer")) if row["layer"] else None, int(row["n_parameters"])),
                *(number(row, name) for name in norms),
            )
            for row in self._lines("weights", "by_kind.csv", WeightPart._fields)
        ]

    @cached_property
    def activation_difference(self) -> dict[str, Any]:
        """How far apart the two models' activations at the site are."""
        return self._json("weights/activations.json") or {}

    @cached_property
    def training(self) -> list[TrainingLog]:
        """What was trained here, by the SAE's id."""
        found = []
        for path in sorted(self.run.glob("saes/*/train_log.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            provenance = self._json(f"saes/{path.parent.name}/provenance.json") or {}
            if lines and provenance:
                found.append(TrainingLog(path.parent.name, provenance, [json.loads(line) for line in lines]))
        return found

    def _cells(self, stage: str, verb: str) -> Cells | None:
        return read_cells(self.run, stage, verb) if (self.run / stage / "rows.csv").exists() else None

    def _lines(self, stage: str, name: str, columns: Sequence[str]) -> list[Row]:
        there = (self.run / stage / name).exists()
        return read_lines(self.run, stage, name, columns, stage) if there else []

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.run / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
