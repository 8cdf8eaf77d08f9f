"""Sweeps over small studies, as files on disk."""

from pathlib import Path
from typing import Any

import yaml

from tests.studies import write_study

CPU = {"engine": "local", "slots": 2}


def write_sweep(
    directory: Path,
    pair: tuple[Path, Path],
    text: Path,
    grid: dict[str, list[Any]] | None = None,
    launcher: Any = None,
    **sections: Any,
) -> Path:
    """A sweep over the study of `write_study`, by default two layers by two widths.

    Returns:
        The sweep file.
    """
    directory.mkdir(exist_ok=True)
    study = write_study(directory, *pair, text, **sections)
    path = directory / "sweep.yaml"
    sweep = {
        "study": study.name,
        "grid": {"site.layer": [0, 1], "saes.widths": [[64], [128]]} if grid is None else grid,
        "launcher": CPU if launcher is None else launcher,
    }
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path
