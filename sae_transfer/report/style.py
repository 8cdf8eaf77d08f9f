"""How figures look, and how they are written: print sizes, colours that colour-blind readers tell apart, no dates."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from sae_transfer.study import replacing

WIDE, NARROW = 7.0, 3.3
"""Inches: two columns of a paper, and one."""

DPI = 200
PAD = 0.03  # of an inch, around what is drawn
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
"""Okabe and Ito's palette."""

MODEL_COLOURS = {"base": BLUE, "chat": VERMILLION}
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX<>*"
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))

RC: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "sae-transfer",  # else ids are random
}


@contextmanager
def styled() -> Iterator[None]:
    """The house style, for making figures and for writing them."""
    with mpl.rc_context():
        mpl.rcdefaults()  # not what a person has set: the same figure on every machine
        mpl.rcParams.update(RC)
        yield


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its files and a caption that says what is seen."""

    name: str
    caption: str
    figure: Figure

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write NAME.png and NAME.svg; the same figure gives the same bytes.

        Args:
            directory: Where to.

        Returns:
            The two paths.

        Raises:
            StudyError: They cannot be written.
        """
        png, svg = (directory / f"{self.name}{suffix}" for suffix in (".png", ".svg"))
        with styled():
            # layout and extent once: left to `savefig`, they take most of the time of each file
            if (engine := self.figure.get_layout_engine()) is not None:
                engine.execute(self.figure)
            self.figure.set_layout_engine(None)
            extent = self.figure.get_tightbbox().padded(PAD)
            for path, metadata in ((png, {"Software": None}), (svg, {"Date": None})):
                with replacing(path) as temporary:
                    self.figure.savefig(temporary, metadata=metadata, bbox_inches=extent)
        return png, svg


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plain(text: str) -> str:
    """A text that matplotlib prints as it is: no mathematics, and code points for what its font lacks."""
    shown = (c if ord(c) in _glyphs() else f"U+{ord(c):04X}" for c in text)
    return "".join(shown).replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def legend_below(figure: Figure, handles: Sequence[Any], *, columns: int = 4) -> None:
    """One legend for all panels, under them."""
    if handles:
        labels = [handle.get_label() for handle in handles]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


def spread_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic when one cell would flatten all others (Gemma's CE delta of 96 nats).

    Args:
        axes: Whose.
        values: What is drawn along it; with a zero or a negative one, the axis is linear around zero.
    """
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) < 3 or np.abs(finite).max() <= 30 * np.median(np.abs(finite)):
        return
    if finite.min() > 0:
        plain_log(axes, "y")
    else:
        axes.set_yscale("symlog", linthresh=float(np.median(np.abs(finite))) or 1.0)


def plain_log(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis that reads 0.02, 0.05, 0.1 and not as powers of ten; to be called when all is drawn."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set_xscale("log") if which == "x" else axes.set_yscale("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = math.log10(high / low)
    # Along x, numbers stand side by side and need more room.
    steps = (
        ((0.5, (1, 1.5, 2, 3, 5, 7)), (1.0, (1, 2, 3, 5)), (1.6, (1, 2, 5)), (2.6, (1, 3)))
        if which == "x"
        else ((0.9, (1, 1.5, 2, 3, 5, 7)), (3.0, (1, 2, 5)), (4.0, (1, 3)))
    )
    axis.set_major_locator(LogLocator(subs=next((subs for most, subs in steps if decades < most), (1,))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def token_axis(axes: Axes) -> None:
    """Tokens along x, read as 50k or 5M."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel("Tokens")


def short_count(value: float) -> str:
    """A number of tokens as a study file has it: 50k, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"


def label_points(axes: Axes, points: NDArray[np.float64], texts: Sequence[str]) -> int:
    """Label points with short leader lines so that no label covers another one or leaves the panel.

    Args:
        axes: A panel whose points are drawn and whose limits stand.
        points: `[n 2]` in data coordinates, the most important first.
        texts: A label a point; one that finds no room is left out.

    Returns:
        The number of labels drawn.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axes.get_window_extent(renderer)
    at = axes.transData.transform(points)
    drawn = np.concatenate([axes.transData.transform(np.asarray(c.get_offsets())) for c in axes.collections])
    unit = figure.dpi / 72
    marks = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in at]
    labels: list[Bbox] = []
    leaders = np.empty((0, 2))
    shares = np.linspace(0.0, 1.0, 25)[:, None]
    for (x, y), point, text in zip(at, points, texts, strict=True):
        label = axes.annotate(text, point, textcoords="offset points", xytext=(0, 0), fontsize=8)
        size = label.get_window_extent(renderer)
        room = []
        for radius, angle in itertools.product((9, 16, 26, 40, 60), np.arange(0, 360, 30)):
            dx, dy = (radius * unit * f(np.deg2rad(angle)) for f in (np.cos, np.sin))
            # The label's nearest end, not its middle, is `radius` away from the point.
            left = x + dx - (size.width if dx < -1 else 0 if dx > 1 else size.width / 2)
            box = Bbox.from_bounds(left, y + dy - size.height / 2, size.width, size.height)
            leader = (x, y) + shares * ((np.clip(x, box.x0, box.x1), (box.y0 + box.y1) / 2) - np.array((x, y)))
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            covers = any(box.overlaps(other) for other in (*marks, *labels)) or box.count_contains(leaders)
            if inside and not covers and not any(other.count_contains(leader) for other in labels):
                room.append((box.count_contains(drawn), radius, box, leader))
        label.remove()
        if not room:
            continue
        *_, box, leader = min(room, key=lambda place: place[:2])
        offset = ((box.x0 - x) / unit, ((box.y0 + box.y1) / 2 - y) / unit)
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": "#555555", "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            *(text, point),
            xytext=offset,
            textcoords="offset points",
            va="center",
            fontsize=8,
            arrowprops=arrow,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )
        labels.append(box)
        leaders = np.concatenate([leaders, leader])
    return len(labels)
