"""Cells as files: rows.csv (a row a cell), transfer.csv (paired gaps), sums.npz (what both come from)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sae_transfer.analysis.cells import CellSums
from sae_transfer.analysis.metrics import INTERVAL_METRICS, METRICS, SUMS, Averaging, Bootstrap, Summary
from sae_transfer.study import replacing, write_text


@dataclass(frozen=True)
class CellLabel:
    """The columns of rows.csv that say which cell it is, in their order."""

    section: str
    sae: str
    sae_trained_on: str
    architecture: str
    d_sae: int
    sparsity_key: str | None
    sparsity_value: float | None
    seed: int | None
    model: str
    hook_name: str
    dtype: str
    scale: str
    norm_scale: float
    sae_scale: float | None
    outliers: str
    outlier_threshold: float | None
    averaging: str

    @property
    def place(self) -> tuple[object, ...]:
        """What transferred and native cell have in common: model, section, policies, and the SAE's settings."""
        settings = (self.architecture, self.d_sae, self.sparsity_key, self.sparsity_value, self.seed)
        return (self.section, self.model, self.scale, self.outliers, *settings)


@dataclass(frozen=True)
class Cell:
    """A label, its sums and its count of outliers (in the section, excluded or not)."""

    label: CellLabel
    result: CellSums
    n_outliers: int


def write_rows(directory: Path, cells: Sequence[Cell], averaging: Averaging, batch_size: int) -> None:
    """Write rows.csv, transfer.csv and sums.npz of one stage.

    Args:
        directory: Where to.
        cells: Of any number of sections and models, all over the same sequences.
        averaging: How metrics are averaged; the bootstrap follows.
        batch_size: Sequences of a batch under `averaging: batch`.
    """
    bootstrap = Bootstrap(len(cells[0].result.sums["n_tokens"]), averaging, batch_size)
    summaries = {cell.label: bootstrap.summarise(cell.result.sums) for cell in cells}
    write_text(directory / "rows.csv", pd.DataFrame([_row(c, summaries[c.label]) for c in cells]).to_csv(index=False))
    write_text(directory / "transfer.csv", _transfer(summaries).to_csv(index=False))
    arrays = {name: np.stack([cell.result.sums[name] for cell in cells]) for name in SUMS}
    with replacing(directory / "sums.npz") as path:
        np.savez_compressed(path, allow_pickle=False, **arrays)


def _row(cell: Cell, summary: Summary) -> dict[str, object]:
    sums = cell.result.sums
    values = {**summary.values, "frac_alive": float(cell.result.alive.mean())}
    row: dict[str, object] = {
        **asdict(cell.label),
        "n_tokens": int(sums["n_tokens"].sum()),
        "n_loss_tokens": int(sums["n_loss_tokens"].sum()),
        "n_outliers": cell.n_outliers,
        "n_sequences": len(sums["n_tokens"]),
        **{metric: values[metric] for metric in METRICS},
    }
    for metric in METRICS:
        _, row[f"{metric}_low"], row[f"{metric}_high"] = (
            summary.estimate(metric) if metric in INTERVAL_METRICS else (None, None, None)
        )
    return row


def _transfer(summaries: Mapping[CellLabel, Summary]) -> pd.DataFrame:
    """Gaps transferred - native of all cells that differ in nothing but which model the SAE was trained on."""
    rows = []
    for label, summary in summaries.items():
        natives = [other for other in summaries if other.sae_trained_on == other.model and other.place == label.place]
        if label.sae_trained_on == label.model:
            continue
        for native in natives:
            row: dict[str, object] = {
                "section": label.section,
                "model": label.model,
                "scale": label.scale,
                "outliers": label.outliers,
                "transferred": label.sae,
                "native": native.sae,
            }
            for metric in INTERVAL_METRICS:
                gap = summary.gap(summaries[native], metric)
                row |= {f"{metric}_gap": gap.value, f"{metric}_low": gap.low, f"{metric}_high": gap.high}
            rows.append(row)
    columns = ["section", "model", "scale", "outliers", "transferred", "native"]
    columns += [f"{metric}_{end}" for metric in INTERVAL_METRICS for end in ("gap", "low", "high")]
    return pd.DataFrame(rows, columns=columns)
