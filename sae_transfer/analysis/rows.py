"""Cells as files: rows.csv (a row a cell), transfer.csv and seeds.csv (paired gaps), sums.npz (what all come from)."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_transfer.analysis.cells import CellSums
from sae_transfer.analysis.metrics import INTERVAL_METRICS, METRICS, SUMS, Averaging, Bootstrap, Summary
from sae_transfer.saes.store import StoredSAE
from sae_transfer.study import replacing, write_text

logger = logging.getLogger(__name__)

TRANSFER = ("transferred", "native")  # the columns that name the two SAEs of a gap


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

    @classmethod
    def of(cls, sae: StoredSAE, **circumstances: Any) -> "CellLabel":
        """The label of a cell of this SAE; `circumstances` are the columns that do not describe the SAE."""
        return cls(
            sae=sae.name,
            sae_trained_on=sae.trained_on,
            architecture=sae.architecture,
            d_sae=sae.d_sae,
            sparsity_key=sae.sparsity_key,
            sparsity_value=sae.sparsity_value,
            seed=sae.seed,
            sae_scale=sae.scale,
            **circumstances,
        )

    @property
    def place(self) -> tuple[object, ...]:
        """What transferred and native cell have in common: model, section, policies, and the SAE's settings."""
        settings = (self.architecture, self.d_sae, self.sparsity_key, self.sparsity_value, self.seed)
        return (self.section, self.model, self.scale, self.outliers, *settings)


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        label: Which.
        result: Its sums.
        n_outliers: Outliers in the section, excluded or not.
        role: Of the SAE; a control is native to no gap.
    """

    label: CellLabel
    result: CellSums
    n_outliers: int
    role: str


def write_rows(directory: Path, cells: Sequence[Cell], averaging: Averaging, batch_size: int) -> None:
    """Write rows.csv, transfer.csv, seeds.csv and sums.npz of one stage.

    Args:
        directory: Where to.
        cells: Of any number of sections and models, all over the same sequences.
        averaging: How metrics are averaged; the bootstrap follows.
        batch_size: Sequences of a batch under `averaging: batch`.
    """
    bootstrap = Bootstrap(len(cells[0].result.sums["n_tokens"]), averaging, batch_size)
    summaries = {cell.label: bootstrap.summarise(cell.result.sums) for cell in cells}
    write_text(directory / "rows.csv", pd.DataFrame([_row(c, summaries[c.label]) for c in cells]).to_csv(index=False))
    clear = _clear_pairs(cells)
    for name, pairs, columns in (
        ("transfer.csv", lambda first, second: _is_transfer(first, second) and clear(first, second), TRANSFER),
        ("seeds.csv", _is_seed_pair, ("first", "second")),
    ):
        write_text(directory / name, _gaps(cells, summaries, pairs, columns).to_csv(index=False))
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


def _gaps(
    cells: Sequence[Cell],
    summaries: Mapping[CellLabel, Summary],
    pairs: Callable[[Cell, Cell], bool],
    names: tuple[str, str],
) -> pd.DataFrame:
    """Gaps first - second, with paired intervals, of every ordered pair of cells that `pairs` accepts."""
    rows = []
    for first in cells:
        for second in cells:
            if not pairs(first, second):
                continue
            label = first.label
            row: dict[str, object] = {
                "section": label.section,
                "model": label.model,
                "scale": label.scale,
                "outliers": label.outliers,
                names[0]: label.sae,
                names[1]: second.label.sae,
            }
            for metric in INTERVAL_METRICS:
                gap = summaries[label].gap(summaries[second.label], metric)
                row |= {f"{metric}_gap": gap.value, f"{metric}_low": gap.low, f"{metric}_high": gap.high}
            rows.append(row)
    columns = ["section", "model", "scale", "outliers", *names]
    columns += [f"{metric}_{end}" for metric in INTERVAL_METRICS for end in ("gap", "low", "high")]
    return pd.DataFrame(rows, columns=columns)


def _clear_pairs(cells: Sequence[Cell]) -> Callable[[Cell, Cell], bool]:
    """Whether two SAEs are each other's counterpart.

    Those from elsewhere often record neither sparsity nor seed: they are paired only where each is alone of its kind.
    """
    twins = Counter((cell.label.place, cell.label.sae_trained_on) for cell in cells if cell.label.seed is None)
    several = {key for key, count in twins.items() if count > 1}
    if several:
        logger.warning("several external SAEs have the same settings; which is whose counterpart is not known: no gaps")

    def clear(first: Cell, second: Cell) -> bool:
        return not {(cell.label.place, cell.label.sae_trained_on) for cell in (first, second)} & several

    return clear


def _is_transfer(first: Cell, second: Cell) -> bool:
    """The second SAE is native, the first differs from it in nothing but where it was trained; no controls."""
    is_native = second.label.sae_trained_on == second.label.model and second.role == "trained"
    is_transferred = first.label.sae_trained_on != first.label.model and first.role != "control"
    return is_native and is_transferred and first.label.place == second.label.place


def _is_seed_pair(first: Cell, second: Cell) -> bool:
    """Two SAEs trained on one model that differ in nothing but the seed, each pair once."""
    one, other = first.label, second.label
    seeds_differ = one.seed is not None and other.seed is not None and one.seed > other.seed
    same_training = one.sae_trained_on == other.sae_trained_on and first.role == second.role == "trained"
    return seeds_differ and same_training and one.place[:-1] == other.place[:-1]
