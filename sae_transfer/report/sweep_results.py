"""What a sweep's directory holds, read for its report: cells with results, grouped, and cells without, with the reason.

Nothing that one cell's files hold, or lack, keeps the others from being read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sae_transfer.errors import StudyError
from sae_transfer.report.columns import CONTEXT
from sae_transfer.report.gap_tables import judgements
from sae_transfer.report.results import Cells, Results, Row
from sae_transfer.report.tables import long_table
from sae_transfer.report.words import provenance

SAE_KEYS = tuple(f"saes.{key}" for key in ("architecture", "widths", "l1_coefficient", "k", "l0_coefficient", "seeds"))
"""Grid keys that every row tells by itself; cells that differ in these alone lie on common frontiers."""


class ModelPair(NamedTuple):
    """The two models as the study file names them."""

    base: str
    chat: str

    @property
    def words(self) -> str:
        """For a title."""
        return f"{self.base} (base) and {self.chat} (chat)"

    def short(self, model: str) -> str:
        """The name of `base` or `chat`; of a directory, its last part."""
        name = getattr(self, model)
        return Path(name).name if Path(name).is_absolute() else name


@dataclass(frozen=True)
class Cell:
    """A cell that has results. The rows begin with the cell's id, its study's name and its place in the grid."""

    id: str
    study: str
    settings: dict[str, str]
    pair: ModelPair
    layer: int
    hook_name: str
    margin: float
    cells: Cells
    results: Results


class Missing(NamedTuple):
    """A cell without results."""

    id: str
    study: str
    state: str
    """As `sae-transfer status` has it; empty where it is not known."""

    message: str


@dataclass(frozen=True, eq=False)
class Group:
    """Cells of one study file that differ in their SAEs alone, as if one run had trained and evaluated them all."""

    study: str
    settings: dict[str, str]
    """Place in the grid, without layer and SAEs."""

    pair: ModelPair
    layer: int
    hook_name: str
    margin: float
    cells: Cells


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep."""

    settings: list[dict[str, str]]
    """Place in the grid of every cell, with results or without."""

    cells: list[Cell]
    missing: list[Missing]

    @property
    def keys(self) -> list[str]:
        """Of the grid."""
        return list(dict.fromkeys(key for settings in self.settings for key in settings))

    @property
    def leading(self) -> list[str]:
        """The columns that every row begins with."""
        return ["cell", "study", *map(column, self.keys)]

    def groups(self) -> list[Group]:
        """The cells that have results, grouped; an SAE from elsewhere that several evaluated counts once."""
        found: dict[tuple[Any, ...], Group] = {}
        for cell in self.cells:
            rest = {k: value for k, value in cell.settings.items() if k != "site.layer" and k not in SAE_KEYS}
            key = (cell.study, cell.pair, cell.hook_name, *rest.items())
            group = Group(cell.study, rest, cell.pair, cell.layer, cell.hook_name, cell.margin, cell.cells)
            if key in found:
                group = replace(group, cells=_joined(found[key].cells, cell.cells))
            found[key] = group
        return list(found.values())


def column(key: str) -> str:
    """The column of a grid key: its own name, unless rows have one such already."""
    return f"study.{key}" if key in CONTEXT else key


def read_sweep(directory: Path, states: Mapping[str, tuple[str, str]]) -> Sweep:
    """Read cells.json and every cell's cross-evaluation.

    Args:
        directory: A sweep's directory.
        states: State and message of each cell, as far as known.

    Returns:
        The cells with results and those without, in the order of cells.json.

    Raises:
        StudyError: There is no cells.json that could be read.
    """
    path = directory / "cells.json"
    try:
        listed = [
            (str(entry["id"]), str(entry["study"]), {key: _text(value) for key, value in entry["settings"].items()})
            for entry in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path}: not the list of a sweep's cells ({type(error).__name__}: {error})",
            "sae-transfer sweep SWEEP --out DIR, which writes it",
        ) from error
    cells, missing = [], []
    for cell_id, study, settings in listed:
        try:
            cells.append(_read_cell(directory, cell_id, study, settings))
        # Whatever a damaged cell raises, the report of the others is made.
        except Exception as error:
            damage = str(error).partition("\n")[0] if isinstance(error, StudyError) else f"not readable ({error!r})"
            state, message = states.get(cell_id, ("", ""))
            found = "; ".join(filter(None, (message, damage.replace(f"{directory}/", ""))))
            missing.append(Missing(cell_id, study, state, found))
    return Sweep([settings for *_, settings in listed], cells, missing)


def _read_cell(directory: Path, cell_id: str, name: str, settings: dict[str, str]) -> Cell:
    results = Results(directory / "cells" / cell_id)
    study = results.study
    if study is None or results.cross_eval is None:
        raise StudyError("not evaluated yet" if study else "not started")
    margin = study.report.margin
    # Everything that the report will compute is computed here once, so that damage shows in the cell that has it.
    long_table(results.cross_eval)
    judgements(results.cross_eval, margin)
    provenance(results)
    place = {"cell": cell_id, "study": name} | {column(key): value for key, value in settings.items()}
    cells = Cells(*([place | row for row in rows] for rows in results.cross_eval))
    pair = ModelPair(study.pair.base, study.pair.chat)
    return Cell(cell_id, name, settings, pair, study.site.layer, study.site.hook_name, margin, cells, results)


def _joined(one: Cells, other: Cells) -> Cells:
    return Cells(*(_distinct([*rows, *more]) for rows, more in zip(one, other, strict=True)))


def _distinct(rows: Iterable[Row]) -> list[Row]:
    ends = ("section", "scale", "outliers", "model", "sae", "transferred", "native", "first", "second")
    return list({tuple(row.get(end) for end in ends): row for row in rows}.values())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
