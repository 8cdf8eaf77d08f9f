import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_transfer.errors import StudyError
from sae_transfer.study_file import parse_study_file
from sae_transfer.sweep.cells import Cell, cell_directory, expand, freeze, read_cells
from sae_transfer.sweep.file import load_sweep, read_launcher, sweep_yaml
from tests.sweep.sweeps import write_sweep

Pair = tuple[Path, Path]


def cells_of(
    tmp_path: Path, pair: Pair, text: Path, grid: dict[str, list[Any]], *sets: str, **sections: Any
) -> list[Cell]:
    return expand(load_sweep(write_sweep(tmp_path, pair, text, grid, **sections)), sets)


def problems(path: Path, *sets: str) -> list[str]:
    with pytest.raises(StudyError) as caught:
        expand(load_sweep(path), sets)
    return [line for line in str(caught.value).splitlines() if not line.startswith("  try")]


def test_a_grid_is_the_product_of_its_values_for_every_study(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, llama_pair, text_file)
    sweep = yaml.safe_load(path.read_text())
    (tmp_path / "other.yaml").write_text((tmp_path / "small.yaml").read_text().replace("resid_pre", "resid_post"))
    path.write_text(yaml.safe_dump({**sweep, "study": ["small.yaml", "other.yaml"]}, sort_keys=False))
    cells = expand(load_sweep(path))
    assert [(cell.of, *cell.settings.values()) for cell in cells] == [
        (name, layer, [width]) for name in ("small", "other") for layer in (0, 1) for width in (64, 128)
    ]
    for cell in cells:
        assert cell.study.site.layer == cell.settings["site.layer"]
        assert [spec.d_sae for spec in cell.study.sae_specs()] == cell.settings["saes.widths"]
        assert cell.study.site.hook == ("resid_pre" if cell.of == "small" else "resid_post")


def test_a_key_below_saes_goes_into_every_entry_and_a_list_is_one_value(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    entries = [{"widths": [64], "l1_coefficient": [1]}, {"architecture": "topk", "k": [4], "widths": [64]}]
    (cell,) = cells_of(tmp_path, llama_pair, text_file, {"saes.widths": [[32, 48]]}, saes=entries)
    assert sorted(spec.name for spec in cell.study.sae_specs()) == [
        "standard-w32-l1_1-s0",
        "standard-w48-l1_1-s0",
        "topk-w32-k4-s0",
        "topk-w48-k4-s0",
    ]


def test_an_id_depends_on_the_cell_alone_and_is_safe_as_a_directory(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    grid = {"site.layer": [0, 1], "train.lr": [1e-3, 1e-4]}
    ids = {cell.id for cell in cells_of(tmp_path, llama_pair, text_file, grid)}
    turned = {"train.lr": [1e-4], "site.layer": [1, 2, 0]}
    assert {cell.id for cell in cells_of(tmp_path, llama_pair, text_file, turned) if cell.study.site.layer < 2} < ids
    assert all(re.fullmatch(r"small-layer[01]-lr0\.0+1-[0-9a-f]{6}", name) for name in ids), ids
    long = {"tokens.bos_token": ["../../" + "x" * 200], "saes.widths": [[64] * 1]}
    (cell,) = cells_of(tmp_path, llama_pair, text_file, long)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", cell.id)
    assert cell_directory(tmp_path, cell.id).parent == tmp_path / "cells"


def test_an_id_changes_with_what_changes_numbers_and_with_nothing_else(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    def only(*sets: str) -> str:
        (cell,) = cells_of(tmp_path, llama_pair, text_file, {"site.layer": [1]}, *sets)
        return cell.id

    assert only() == only("compute.device=auto") == only("tracking.wandb=offline") == only("report.margin=0.1")
    assert len({only(), only("train.lr=2e-3"), only("evaluate.tokens=512"), only("name=other")}) == 4


def test_every_problem_of_every_cell_is_told_once_with_its_cell(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    grid = {"site.layer": [1, -1], "train.lrr": [1], "train.batch_size": [64, 9999]}
    found = problems(write_sweep(tmp_path, llama_pair, text_file, grid), "evaluate.tokns=3")
    shared = [line for line in found if not line.startswith("cell ")]
    assert shared == [
        "grid: train.lrr: unknown key; did you mean lr?",
        "--set evaluate.tokns=3: evaluate.tokns: unknown key; did you mean tokens?",
    ]
    assert [line.partition(" of ")[0] for line in found if "site.layer: got -1" in line] == [
        f"cell site.layer=-1, train.lrr=1, train.batch_size={size}" for size in (64, 9999)
    ]
    assert sum("9999 is more than all of train.tokens" in line for line in found) == 2


def test_mistakes_in_a_sweep_file_are_told_at_once(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, llama_pair, text_file)
    path.write_text(
        "studdy: x\ngrid: {site.layer: 3, saes.widths: [], train.lr: [1, 1]}\nlauncher: {engin: slurm, slots: 0}\n"
    )
    assert [line.removeprefix(f"{path}: ") for line in problems(path)] == [
        "study: missing; expected: A study file, or a list of them.",
        "grid.site.layer: got 3; expected a list",
        "grid.saes.widths: got []; expected at least one entry",
        "grid.train.lr: got [1, 1]; expected no value twice",
        "launcher.slots: got 0; expected a number above 0",
        "launcher.engin: unknown key; did you mean engine?",
        "studdy: unknown key; did you mean study?",
    ]
    path.write_text("study: x\nlauncher: {slurm: {output: /elsewhere, qos: low}}\n")
    assert problems(path) == [
        f"{path}: launcher.slurm: got a mapping;"
        " expected options that sae-transfer does not set itself, as it does output"
    ]
    path.write_text("study: x\ngrid: 3\n")
    assert problems(path) == [f"{path}: grid: got 3; expected a mapping of keys to values"]
    path.write_text("study: missing.yaml")
    assert "found neither" in problems(path)[0]


def test_a_key_both_set_and_in_the_grid_is_refused_and_so_are_equal_cells(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    path = write_sweep(tmp_path, llama_pair, text_file)
    assert problems(path, "site.layer=1") == ["--set site.layer: is a key of the grid"]
    sweep = yaml.safe_load(path.read_text())
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "small.yaml").write_text((tmp_path / "small.yaml").read_text())
    path.write_text(yaml.safe_dump({**sweep, "study": ["small.yaml", "below/small.yaml"]}))
    assert "more than one cell is this same study" in problems(path)[0]


def test_a_launcher_may_be_a_file_of_its_own(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("engine: slurm\npartition: gpu\nmem_gb: null\nslurm: {qos: low}\n")
    path = write_sweep(tmp_path, llama_pair, text_file, launcher="cluster.yaml")
    sweep = load_sweep(path)
    assert (sweep.launcher.partition, sweep.launcher.mem_gb, sweep.launcher.slurm) == ("gpu", None, {"qos": "low"})
    (tmp_path / "kept.yaml").write_text(sweep_yaml(sweep))
    assert load_sweep(tmp_path / "kept.yaml") == sweep
    (tmp_path / "small.yaml").unlink()
    assert read_launcher(tmp_path / "kept.yaml") == sweep.launcher, "also where the studies are not"
    (tmp_path / "cluster.yaml").write_text("engine: slurmm\n")
    assert problems(path) == [f'{tmp_path / "cluster.yaml"}: engine: got "slurmm"; expected one of slurm or local']


def test_cells_are_frozen_once_and_a_sweep_only_grows(
    llama_pair: Pair, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    few = cells_of(tmp_path, llama_pair, text_file, {"site.layer": [0, 1]})
    freeze(few, out)
    frozen = {path: path.read_bytes() for path in out.glob("cells/*/study.yaml")}
    assert {parse_study_file(path).name for path in frozen} == {cell.id for cell in few}
    assert parse_study_file(cell_directory(out, few[0].id) / "study.yaml") == few[0].study

    freeze(cells_of(tmp_path, llama_pair, text_file, {"site.layer": [2, 1, 0]}), out)
    assert len(list(out.glob("cells/*/study.yaml"))) == 3
    assert all(path.read_bytes() == content for path, content in frozen.items())
    assert json.loads((out / "cells.json").read_text())[0] == {
        **read_cells(out)[0],
        "study": "small",
        "settings": {"site.layer": 2},
    }

    for changed in ({"site.layer": [0, 1]}, {"site.layer": [0, 1, 2], "train.lr": [1e-3]}):
        with pytest.raises(StudyError, match="not so, in the sweep"):
            freeze(cells_of(tmp_path, llama_pair, text_file, changed), out)
    assert len(read_cells(out)) == 3

    with caplog.at_level(logging.WARNING):
        freeze(cells_of(tmp_path, llama_pair, text_file, {"site.layer": [0, 1, 2]}, "compute.device=auto"), out)
    assert "stays as frozen; the sweep now says otherwise of compute" in caplog.text
    other = tmp_path / "other.txt"
    other.write_text("other words")
    with pytest.raises(StudyError, match="another tokens"):
        freeze(cells_of(tmp_path, llama_pair, other, {"site.layer": [0, 1, 2]}), out)


def test_an_override_without_a_value_is_told_as_such(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, llama_pair, text_file, {"train.lr": [1e-3, 1e-4]}))
    with pytest.raises(StudyError, match=r"--set train\.lr: needs KEY=VALUE"):
        expand(sweep, ["train.lr"])


def test_a_remedy_names_a_command_that_can_be_typed(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("study: []\n")
    with pytest.raises(StudyError, match=r"sae-transfer sweep .* --out DIR --dry-run"):
        load_sweep(path)
