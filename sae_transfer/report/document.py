"""One HTML file that holds words, tables and figures and opens anywhere, and the files of its tables and figures."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from sae_transfer.report.formats import TEXT_COLUMNS, Table
from sae_transfer.report.style import Plot
from sae_transfer.report.words import Headline
from sae_transfer.study import write_text

PLOT_NAMES = (
    *("ce_bars", "frontier", "instruct_ce_bars", "finetune_budget", "training", "finetune_training"),
    *("norm_histogram", "error_by_norm", "thresholds", "weights"),
)
"""What the names of figures begin with; a policy or a setting may follow."""

FOLDED = {
    "transfer": "Gaps of every metric, with intervals",
    "instruct_transfer": "Gaps of every metric, with intervals",
    "cross_eval_long": "Every metric, with intervals",
    "instruct_long": "Every metric, with intervals",
    "equal_l0": "Gaps of every metric at equal L0",
    "thresholds": "Metrics against the outlier threshold",
}
"""Tables that stand closed on the page, for looking up and not for reading, with what they are."""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, words, tables and figures; or one line that says what would fill it."""

    id: str
    heading: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Document:
    """What a page says. The sections may hold `verdict`, under which the headlines and their rule stand."""

    title: str
    introduction: Sequence[str]
    headlines: Sequence[Headline]
    rule: str
    seeds_known: bool
    """Whether any verdict rests on a noise floor between seeds."""

    sections: Sequence[Section]
    n_sequences: int | None
    """Evaluated sequences, where all numbers have as many."""

    scale_ratio: float | None
    """How many times as long the chat model's raw activations are, where there is one such number."""

    provenance: Sequence[tuple[str, str]]


def write_document(document: Document, target: Path) -> Path:
    """Write tables/*, figures/* and index.html, and remove tables and figures that an earlier one had.

    Args:
        document: What to write.
        target: The report's directory.

    Returns:
        The page.

    Raises:
        StudyError: It cannot be written.
    """
    for table in (table for section in document.sections for table in section.tables):
        table.write(target / "tables")
    images = {}
    for plot in (plot for section in document.sections for plot in section.plots):
        images[plot.name] = _data_uri(plot.write(target / "figures")[1])
    _remove_old(target / "figures", images)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = files("sae_transfer.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    parts = {field.name: getattr(document, field.name) for field in fields(document)}
    text = environment.from_string(template).render(parts, images=images, text_columns=TEXT_COLUMNS, folded=FOLDED)
    page = target / "index.html"
    write_text(page, text)
    return page


def _data_uri(svg: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"


def _remove_old(directory: Path, names: Iterable[str]) -> None:
    """Remove figures of an earlier evaluation, which had other SAEs or policies; what others put there stays."""
    keep = set(names)
    ours = re.compile(rf"({'|'.join(PLOT_NAMES)})(_.*)?\.(png|svg)")
    for path in directory.glob("*"):
        if ours.fullmatch(path.name) and path.stem not in keep:
            path.unlink()
