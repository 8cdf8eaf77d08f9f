"""From a sweep to its cells: every combination of the grid as a study of its own, named for good and frozen on disk."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sae_transfer.config import SIDES, Study, number_fields
from sae_transfer.errors import StudyError
from sae_transfer.study import digest, write_json, write_text
from sae_transfer.study_file import load_study, parse_study_file, resolved_yaml
from sae_transfer.sweep.file import SweepFile

logger = logging.getLogger(__name__)

# What a cell's frozen study may come to differ in without its numbers being in doubt.
FREE_SECTIONS = {"name", "tracking", "compute", "report"}


@dataclass(frozen=True)
class Cell:
    """One study of a sweep.

    Attributes:
        id: Directory-safe name; depends on the study file's name, the settings and all that changes numbers, and on
            nothing else: neither on the order of the grid nor on other cells.
        of: Name of the study that it is a setting of.
        settings: Key of the grid -> value, as written in the sweep file.
        study: The study, named after the id.
    """

    id: str
    of: str
    settings: dict[str, Any]
    study: Study


def expand(sweep: SweepFile, overrides: Sequence[str] = ()) -> list[Cell]:
    """Take the product of the grid over every study.

    Args:
        sweep: The sweep.
        overrides: `--set` arguments, applied to every study.

    Returns:
        The cells, in the grid's order.

    Raises:
        StudyError: Everything wrong with any cell, a line each, or two cells that are the same.
    """
    if bare := [text for text in overrides if "=" not in text]:
        raise StudyError(f"--set {bare[0]}: needs KEY=VALUE", "such as --set evaluate.tokens=8192")
    given = {text.partition("=")[0].strip() for text in overrides}
    if both := sorted(given & set(sweep.grid)):
        raise StudyError(f"--set {both[0]}: is a key of the grid", "change the grid, or leave the --set out")
    cells: list[Cell] = []
    problems: list[str] = []
    for path in sweep.study:
        faults: dict[str, list[str]] = {}
        combinations = [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
        for settings in combinations:
            try:
                cells.append(_cell(Path(path), overrides, settings))
            except StudyError as error:
                for line in str(error).splitlines():
                    if not line.startswith("  try: "):
                        faults.setdefault(_without_set(line, settings), []).append(_words(settings))
        for line, where in faults.items():
            in_all = len(where) == len(combinations)
            problems += [line] if in_all else [f"cell {words} of {path}: {line}" for words in where]
    if problems:
        raise StudyError("\n".join(dict.fromkeys(problems)), "mend this in the sweep file or the study file")
    twice = [name for name, count in Counter(cell.id for cell in cells).items() if count > 1]
    if twice:
        raise StudyError(f"{', '.join(twice)}: more than one cell is this same study", "name each study file once")
    return cells


def freeze(cells: Sequence[Cell], directory: Path) -> None:
    """Write each new cell's study file, and the list of cells. A sweep's directory only grows.

    Args:
        cells: All that are asked for now.
        directory: Of the sweep.

    Raises:
        StudyError: A cell that was asked for before is no more, or is there with other models or data.
    """
    require_all_there(cells, directory)
    paths = {cell.id: cell_directory(directory, cell.id) / "study.yaml" for cell in cells}
    for cell in cells:
        if paths[cell.id].exists():
            _compare(cell, paths[cell.id])
    for cell in cells:
        if not paths[cell.id].exists():
            write_text(paths[cell.id], resolved_yaml(cell.study))
    write_json(
        directory / "cells.json", [{"id": cell.id, "study": cell.of, "settings": cell.settings} for cell in cells]
    )


def require_all_there(cells: Sequence[Cell], directory: Path) -> None:
    """Refuse a sweep that lacks cells that were asked for before.

    Raises:
        StudyError: It does.
    """
    asked = {cell.id for cell in cells}
    if dropped := [cell["id"] for cell in read_cells(directory) if cell["id"] not in asked]:
        raise StudyError(
            f"{directory}: holds cells that are not, or not so, in the sweep as given now: {', '.join(dropped)}",
            "the same --set as before if there was one, or another --out DIR; only to gain values keeps the place",
        )


def read_cells(directory: Path) -> list[dict[str, Any]]:
    """The cells asked for, as in cells.json: id, study and settings; none before the first sweep.

    Raises:
        StudyError: The file is damaged.
    """
    path = directory / "cells.json"
    if not path.exists():
        return []
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))
        is_whole = all({"id", "study", "settings"} <= set(cell) for cell in cells)
    except (ValueError, TypeError):
        is_whole, cells = False, []
    if not is_whole:
        raise StudyError(f"{path}: is damaged", "another --out DIR, or put the file back as it was")
    return cells


def cell_directory(directory: Path, cell: str) -> Path:
    """The run directory of a cell."""
    return directory / "cells" / cell


def slug(text: str, longest: int) -> str:
    """Text that is safe in a file name on any system: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)[:longest].strip("_-.")


def _cell(path: Path, overrides: Sequence[str], settings: dict[str, Any]) -> Cell:
    study = load_study(path, [*overrides, *(_as_set(key, value) for key, value in settings.items())])
    readable = slug("-".join(_readable(key, settings[key]) for key in sorted(settings)), 50)
    mark = digest({"of": study.name, "settings": settings, "study": number_fields(study)})[:6]
    name = "-".join(part for part in (slug(study.name, 40) or "study", readable, mark) if part)
    return Cell(name, study.name, settings, study.model_copy(update={"name": name}))


def _as_set(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _without_set(line: str, settings: dict[str, Any]) -> str:
    """A problem's line without the `--set` that a grid's value was passed as."""
    for key, value in settings.items():
        line = line.replace(f"--set {_as_set(key, value)}: ", "grid: ")
    return line


def _readable(key: str, value: Any) -> str:
    """`layer6` of site.layer and 6, `widths8192` of saes.widths and [8192]."""
    return key.rpartition(".")[2] + slug(json.dumps(value), 30)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(_as_set(key, value) for key, value in settings.items()) or "(no grid)"


def _compare(cell: Cell, path: Path) -> None:
    """A frozen study against the one asked for now; the numbers' settings agree, because the id does."""
    frozen, asked = (study.model_dump(mode="json") for study in (parse_study_file(path), cell.study))
    for side in SIDES:  # a run resolves these
        if asked["pair"][f"{side}_revision"] is None:
            frozen["pair"][f"{side}_revision"] = None
    if asked["tokens"]["revision"] is None:
        frozen["tokens"]["revision"] = None
    other = [key for key in asked if asked[key] != frozen[key]]
    if grave := [key for key in other if key not in FREE_SECTIONS]:
        raise StudyError(
            f"{path}: was frozen with another {' and '.join(grave)} than the sweep asks for now",
            "another --out DIR for the changed sweep",
        )
    if other:
        logger.warning("%s: stays as frozen; the sweep now says otherwise of %s", path, ", ".join(other))
