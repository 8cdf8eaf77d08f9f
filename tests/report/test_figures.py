import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from sae_transfer.errors import StudyError
from sae_transfer.report.figures import ce_bars
from sae_transfer.report.page import write_report
from sae_transfer.report.results import read_cells
from sae_transfer.report.style import DPI, WIDE, Plot, label_points, new_figure, plain, short_count, styled
from sae_transfer.report.weight_figures import weights_figure
from tests.report.runs import FIGURES, TABLES, make_run, post_rows, row

NAMES = {
    *(
        f"{name}_{outliers}_matched"
        for name in ("ce_bars", "frontier", "instruct_ce_bars", "finetune_budget")
        for outliers in ("excluded", "kept")
    ),
    *("training", "finetune_training", "norm_histogram", "error_by_norm", "thresholds", "weights"),
}


def test_a_full_run_gives_every_figure_as_png_and_svg(reported: Path) -> None:
    found = {path.name for path in (reported / FIGURES).iterdir()}
    assert found == {f"{name}{suffix}" for name in NAMES for suffix in (".png", ".svg")}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_figure_is_blank_or_wider_than_two_columns(reported: Path, name: str) -> None:
    pixels = imread(reported / FIGURES / f"{name}.png")[..., :3]
    assert 0.3 * WIDE * DPI < pixels.shape[1] <= (WIDE + 0.1) * DPI
    ink = np.asarray((pixels < 0.9).any(axis=-1))
    assert 0.01 < ink.mean() < 0.6
    # Nothing runs over the edge: the outermost pixels are white.
    assert not np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).any()


def test_figures_are_the_same_bytes_when_made_again(tmp_path: Path) -> None:
    cells = read_cells(make_run(tmp_path, [*post_rows(), row("finetuned", "chat")]), "cross_eval", "cross-eval")
    made: list[list[bytes]] = []
    settings: Any
    for settings in ({}, {"figure.autolayout": True, "font.size": 20, "savefig.format": "svg"}):
        with mpl.rc_context(settings):  # what a person has set plays no part
            with styled():
                (plot,) = ce_bars(cells)
            made += [[path.read_bytes() for path in plot.write(tmp_path)] for _ in range(2)]
    assert made[0] == made[1] == made[2] == made[3]
    assert b"<dc:date>" not in made[0][1]


def test_an_svg_refers_to_nothing_outside_itself(reported: Path) -> None:
    for path in (reported / FIGURES).glob("*.svg"):
        links = re.findall(r'(?:href|src)="([^"]*)"', path.read_text())
        assert all(link.startswith(("#", "data:")) for link in links), path.name


def test_figures_and_tables_of_an_earlier_evaluation_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path, [*post_rows(), *post_rows(outliers="kept"), row("finetuned", "chat", outliers="kept")])
    write_report(run)
    names = {"ce_bars_excluded_matched", "ce_bars_kept_matched", "frontier_excluded_matched", "frontier_kept_matched"}
    assert {path.stem for path in (run / FIGURES).iterdir()} == names | {"finetune_budget_kept_matched"}
    (run / FIGURES / "mine.png").write_bytes(b"")
    write_report(make_run(run, post_rows()))
    assert {path.stem for path in (run / FIGURES).iterdir()} == {name for name in names if "kept" not in name} | {
        "mine"
    }
    assert not list((run / TABLES).glob("finetune*"))


def test_a_cell_worse_than_no_layer_at_all_does_not_flatten_the_others(tmp_path: Path) -> None:
    rows = [row("base", "base"), row("chat", "base", ce_sae=98.3, ce_delta=96.2)]
    with styled():
        (plot,) = ce_bars(read_cells(make_run(tmp_path, rows, []), "cross_eval", "cross-eval"))
    (axes,) = plot.figure.axes
    assert axes.get_xlim()[1] == pytest.approx(1.2 * 10.3735, rel=1e-4)
    assert "98.3000 →" in [text.get_text() for text in axes.texts]


def test_labels_of_points_overlap_neither_each_other_nor_the_frame() -> None:
    rng = np.random.default_rng(0)
    with styled():
        figure = new_figure(WIDE, 3)
        axes = figure.subplots()
        points = rng.normal(size=(400, 2))
        axes.scatter(*points.T)
        texts = [f"'token {place}'" for place in range(12)]
        n_drawn = label_points(axes, points[:12], texts)
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [super(type(text), text).get_window_extent(renderer) for text in axes.texts]
        frame = axes.get_window_extent(renderer)
    assert n_drawn == len(boxes) > 8
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_texts_are_drawn_as_they_are() -> None:
    assert plain("$x$ ¶") == r"\$x\$ ¶"
    assert plain("日") == "U+65E5"


@pytest.mark.parametrize(("n", "text"), [(50_000, "50k"), (1_500_000, "1.5M"), (2e9, "2B"), (512, "512"), (0, "0")])
def test_token_counts_read_as_in_a_study_file(n: float, text: str) -> None:
    assert short_count(n) == text


def test_several_studies_share_one_figure_of_weights(reported: Path, tmp_path: Path) -> None:
    figure = weights_figure([reported, reported])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["toy", "toy"]
    png, svg = Plot("weights_of_several", "", figure).write(tmp_path)
    assert png.stat().st_size > 10_000 < svg.stat().st_size
    with pytest.raises(StudyError, match="sae-transfer weights CONFIG"):
        weights_figure([tmp_path])
