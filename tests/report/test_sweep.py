import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread

from sae_transfer.errors import StudyError
from sae_transfer.report.frontier_figures import sweep_frontiers
from sae_transfer.report.style import DPI, WIDE
from sae_transfer.report.sweep import write_sweep_report
from sae_transfer.report.sweep_results import read_sweep
from tests.report.runs import FIGURES, ROWS, TABLES, make_sweep, write_csv, write_json
from tests.report.test_page import Page
from tests.studies import read_rows

NAMES = {f"frontier_by_{name}_{outliers}_matched" for name in ("width", "layer") for outliers in ("excluded", "kept")}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs, two layers, two widths, the sparsities in cells of their own, and their report; not to be changed."""
    directory = tmp_path_factory.mktemp("swept")
    make_sweep(directory, pairs=("qwen", "gemma"), sparsity_in_grid=True)
    write_sweep_report(directory)
    return directory


@pytest.mark.parametrize("name", ["rows", "transfer"])
def test_all_rows_of_all_cells_stand_in_one_file_after_their_place_in_the_grid(swept: Path, name: str) -> None:
    table = read_rows(swept, f"report/{name}.csv")
    leading = ["cell", "study", "site.layer", "saes.widths", "saes.l1_coefficient"]
    assert list(table[0])[:5] == leading
    listed = json.loads((swept / "cells.json").read_text())
    assert len(listed) == 24
    expected = []
    for cell in listed:
        place = [cell["id"], cell["study"], *map(json.dumps, cell["settings"].values())]
        own = read_rows(swept, f"cells/{cell['id']}/cross_eval/{name}.csv")
        expected += [dict(zip(leading, place, strict=True)) | row for row in own]
    assert table == expected


def test_tables_by_pair_have_the_posts_columns_with_layer_and_width(swept: Path) -> None:
    markdown = (swept / TABLES / "cross_eval.md").read_text()
    assert [line for line in markdown.splitlines() if line.startswith("**")] == [
        f"**Cross-evaluation: {pair}/base (base) and {pair}/chat (chat); outliers {outliers}, matched scale.**"
        for pair in ("qwen", "gemma")
        for outliers in ("excluded", "kept")
    ]
    assert (
        "| SAE | Model | Layer | Width | Setting | L0 | CE Loss rec % | Clean CE Loss | SAE CE Loss | CE Delta "
        "| 0 Abl. CE loss | Explained Variance % | MSE |"
    ) in markdown
    table = pd.read_csv(swept / TABLES / "cross_eval.csv")
    assert len(table) == 24 * 8
    first = table.head(4)
    assert list(zip(first["SAE"], first["Model"], strict=True)) == [
        *(("Base", "Base"), ("Chat", "Base"), ("Chat", "Chat"), ("Base", "Chat"))
    ]
    assert {(layer, width, setting) for layer, width, setting in first[["Layer", "Width", "Setting"]].to_numpy()} == {
        (6, 512, "l1 2")
    }
    assert set(table["base_model"]) == {"qwen/base", "gemma/base"}


def test_verdicts_rest_on_the_frontier_over_all_sparsities_though_each_has_its_own_cell(swept: Path) -> None:
    table = pd.read_csv(swept / TABLES / "verdict.csv")
    assert len(table) == 24 * 4
    gaps = table[["Low", "CE Delta gap", "High"]].to_numpy()
    assert (gaps[:, 0] < gaps[:, 1]).all() and (gaps[:, 1] < gaps[:, 2]).all()
    # A transferred SAE has the larger L0 here, so only that of the lowest sparsity lies beyond the native frontier.
    unreached = np.isnan(table["Gap at equal L0"].to_numpy())
    assert set(table["Setting"].to_numpy()[unreached]) == {"l1 2"}
    assert sum(unreached) == len(table) / 3


def test_cells_that_differ_in_more_than_their_saes_are_told_apart_and_never_joined(tmp_path: Path) -> None:
    make_sweep(tmp_path, layers=[6], widths=[512, 1024], sparsities=[4.0])
    listed = json.loads((tmp_path / "cells.json").read_text())
    for lr, cell in zip((1e-4, 3e-4), listed, strict=True):
        cell["settings"] = {"train.lr": lr}
    write_json(tmp_path / "cells.json", listed)
    shutil.rmtree(tmp_path / "cells" / listed[1]["id"])
    shutil.copytree(tmp_path / "cells" / listed[0]["id"], tmp_path / "cells" / listed[1]["id"])
    write_sweep_report(tmp_path)
    table = pd.read_csv(tmp_path / TABLES / "cross_eval.csv")
    assert set(table["Setting"]) == {"train.lr 0.0001", "train.lr 0.0003"}
    assert len(read_sweep(tmp_path, {}).groups()) == 2
    assert "differ in train.lr look alike" in Page(tmp_path / "report/index.html").text


def test_an_sae_from_elsewhere_that_several_cells_evaluated_counts_once(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, layers=[6], widths=[512], sparsities=[2.0, 4.0], sparsity_in_grid=True)
    for run in runs:
        rows = pd.read_csv(run / ROWS).to_dict("records")
        external = {**rows[0], "sae": "scope-16k", "sparsity_key": "", "sparsity_value": "", "seed": ""}
        write_csv(run / ROWS, [*rows, external])
    write_sweep_report(tmp_path)
    table = pd.read_csv(tmp_path / TABLES / "cross_eval.csv")
    assert len(table) == 2 * 8 + 1
    assert list(table["SAE"]).count("scope-16k") == 1
    rows = pd.read_csv(tmp_path / "report/rows.csv")
    assert list(rows["sae"]).count("scope-16k") == 2


def test_every_cell_without_results_is_named_with_its_state_and_the_others_are_reported(tmp_path: Path) -> None:
    absent, unread, cut, nonsense, whole = make_sweep(tmp_path, layers=[1, 2, 3, 4, 5], widths=[512])
    shutil.rmtree(absent)
    (unread / "study.yaml").write_text("pair: [")
    (cut / "cross_eval/transfer.csv").unlink()
    rows = (nonsense / ROWS).read_text().replace("0.93,", "<b>broken</b>,", 1)
    (nonsense / ROWS).write_text(rows)
    write_sweep_report(tmp_path, {absent.name: ("failed", "out of memory"), cut.name: ("running", "")})
    missing = pd.read_csv(tmp_path / TABLES / "missing.csv", keep_default_na=False).set_index("Cell")
    assert missing["State"].to_dict() == {
        absent.name: "failed",
        unread.name: "not known",
        cut.name: "running",
        nonsense.name: "not known",
    }
    assert missing.loc[absent.name, "Message"] == "out of memory; not started"
    assert str(missing.loc[unread.name, "Message"]).startswith(f"cells/{unread.name}/study.yaml: not readable")
    assert "transfer.csv: not there" in str(missing.loc[cut.name, "Message"])
    assert "<b>broken</b>" in str(missing.loc[nonsense.name, "Message"])
    page = Page(tmp_path / "report/index.html")
    assert (
        f"1 of 5 cells have results. Missing: {absent.name}, {unread.name}, {cut.name}, {nonsense.name}." in page.text
    )
    assert set(pd.read_csv(tmp_path / "report/rows.csv")["cell"]) == {whole.name}


def test_a_sweep_without_any_result_has_a_report_that_says_so(tmp_path: Path) -> None:
    for run in make_sweep(tmp_path):
        shutil.rmtree(run)
    page = Page(write_sweep_report(tmp_path))
    assert "0 of 4 cells have results." in page.text
    assert "No cell has results yet." in page.text
    assert (tmp_path / "report/rows.csv").read_text().startswith("cell,study,site.layer,saes.widths,section,sae,")
    assert not (tmp_path / FIGURES).exists()


def test_a_report_made_again_drops_what_is_no_longer_missing(tmp_path: Path) -> None:
    run, *_ = make_sweep(tmp_path)
    run.rename(tmp_path / "aside")
    write_sweep_report(tmp_path)
    assert (tmp_path / TABLES / "missing.md").exists()
    (tmp_path / "aside").rename(run)
    assert "4 of 4 cells have results." in Page(write_sweep_report(tmp_path)).text
    assert not (tmp_path / TABLES / "missing.md").exists()


@pytest.mark.parametrize(
    "content", [None, "[", '{"id": 1}', '[{"id": "a"}]', '[{"id": "a", "study": "b", "settings": 1}]']
)
def test_a_directory_that_is_no_sweeps_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "cells.json").write_text(content)
    with pytest.raises(StudyError, match=r"cells\.json: not the list of a sweep's cells[^$]*sae-transfer sweep SWEEP"):
        write_sweep_report(tmp_path)


def test_a_grid_key_that_is_a_column_already_gets_a_column_of_its_own(tmp_path: Path) -> None:
    make_sweep(tmp_path, layers=[6], widths=[512])
    (cell,) = json.loads((tmp_path / "cells.json").read_text())
    write_json(tmp_path / "cells.json", [cell | {"settings": {"norm_scale": {"base": 2.0, "chat": 1.0}}}])
    write_sweep_report(tmp_path)
    rows = pd.read_csv(tmp_path / "report/rows.csv")
    assert set(rows["study.norm_scale"]) == {'{"base": 2.0, "chat": 1.0}'}
    assert rows["norm_scale"].dtype == float


@pytest.mark.parametrize(
    ("widths", "sparsities", "n_panels", "n_curves"),
    [([512], [4.0], 2, 2), ([512, 2048], [1.0, 2.0, 4.0, 8.0, 16.0], 2, 12)],
)
def test_frontiers_have_a_panel_a_pair_and_model_and_join_points_along_sparsity(
    tmp_path: Path, widths: list[int], sparsities: list[float], n_panels: int, n_curves: int
) -> None:
    make_sweep(tmp_path, layers=[6, 13, 20][: 2 * len(widths) - 1], widths=widths, sparsities=sparsities)
    plots = sweep_frontiers(read_sweep(tmp_path, {}).groups())
    assert {plot.name for plot in plots} == NAMES
    for plot in plots:
        assert len(plot.figure.axes) == n_panels
        for axes in plot.figure.axes:
            curves = [found for found in axes.containers if isinstance(found, ErrorbarContainer)]
            assert [len(np.asarray(errors.lines[0].get_xdata())) for errors in curves] == n_curves * [len(sparsities)]
            looks = {
                (line.get_color(), line.get_marker(), line.get_markerfacecolor())
                for line in (errors.lines[0] for errors in curves)
            }
            assert len(looks) == n_curves
            assert all(errors.lines[2] for errors in curves)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_figure_is_blank_or_runs_over_its_edge(swept: Path, name: str) -> None:
    pixels = imread(swept / FIGURES / f"{name}.png")[..., :3]
    assert 0.9 * WIDE * DPI < pixels.shape[1] <= (WIDE + 0.1) * DPI
    ink = np.asarray((pixels < 0.9).any(axis=-1))
    assert 0.01 < ink.mean() < 0.6
    assert not np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).any()


def test_the_page_needs_nothing_but_itself_and_says_each_thing(swept: Path) -> None:
    page = Page(swept / "report/index.html")
    assert page.sections == ["cells", "verdict", "frontiers", "cross-eval", "method", "provenance"]
    assert all(source.startswith(("#", "data:image/svg+xml;base64,")) for source in page.sources)
    assert page.tags.count("img") == len(NAMES)
    for said in (
        "24 cells: site.layer: 6, 13; saes.widths: [512], [1024]; saes.l1_coefficient: [2.0], [4.0], [8.0].",
        "Models: qwen/base (base) and qwen/chat (chat); gemma/base (base) and gemma/chat (chat).",
        "24 of 24 cells have results.",
        "gemma/base (base) and gemma/chat (chat): base SAE on chat model",
        "git.commit 859bb67",
        "started 24 different values: cells/*/manifest.json",
    ):
        assert said in page.text


def test_the_sweeps_report_is_made_without_torch(tmp_path: Path) -> None:
    make_sweep(tmp_path, layers=[6], widths=[512])
    code = (
        "import sys; from pathlib import Path; from sae_transfer.report.sweep import write_sweep_report;"
        "write_sweep_report(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_the_sweeps_latex_tables_compile_and_none_leaves_the_page(swept: Path, tmp_path: Path) -> None:
    inputs = "".join(rf"\input{{{path}}}\clearpage" for path in sorted((swept / TABLES).glob("*.tex")))
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "document.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert not re.search(r"Overfull \\hbox|Float too large", result.stdout)
