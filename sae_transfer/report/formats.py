"""A table as CSV with every digit, and rounded as Markdown and LaTeX."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sae_transfer.study import write_text

SUFFIXES = (".csv", ".md", ".tex")
TEXT_COLUMNS = frozenset(
    {"SAE", "Against", "Model", "Metric", "Comparison", "Source", "Kind", "Token", "Setting"}
    | {"Cell", "Study", "State", "Message"}
    | {"Verdict", "Positions", "Quantity", "Breakdown", "Note"}
)
"""Columns aligned to the left; all others hold numbers."""


class Line(NamedTuple):
    """One line of a table: as printed, and unrounded with its context, both by column."""

    printed: Mapping[str, str]
    exact: Mapping[str, str | float]


@dataclass(frozen=True)
class TableBlock:
    """One table as printed: what shares a caption, such as the cells of one outlier filter and one scale policy."""

    title: str
    table: pd.DataFrame


@dataclass(frozen=True)
class Table:
    """What is written under one name: lines in blocks, each with its caption; blocks without lines are left out."""

    name: str
    blocks: Sequence[tuple[str, Sequence[Line]]]

    @property
    def printed(self) -> list[TableBlock]:
        """The blocks that have lines, as printed."""
        return [
            TableBlock(title, pd.DataFrame([line.printed for line in lines])) for title, lines in self.blocks if lines
        ]

    def write(self, directory: Path) -> list[Path]:
        """Write NAME.csv, NAME.md and NAME.tex; without lines, remove those of an earlier evaluation.

        Args:
            directory: Where to.

        Returns:
            The files written.

        Raises:
            StudyError: They cannot be written.
        """
        paths = [directory / f"{self.name}{suffix}" for suffix in SUFFIXES]
        blocks = self.printed
        if not blocks:
            for path in paths:
                path.unlink(missing_ok=True)
            return []
        exact = pd.DataFrame([line.exact for _, lines in self.blocks for line in lines])
        texts = (
            exact.to_csv(index=False, lineterminator="\n"),
            "\n".join(map(_markdown, blocks)),
            "\n".join(map(_latex, blocks)),
        )
        for path, text in zip(paths, texts, strict=True):
            write_text(path, text)
        return paths


def _markdown(block: TableBlock) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    columns = list(block.table.columns)
    return "\n".join(
        [
            f"**{block.title}**",
            "",
            line(columns),
            line("---" if column in TEXT_COLUMNS else "---:" for column in columns),
            *(line(cell.replace("|", r"\|") for cell in cells) for cells in block.table.itertuples(index=False)),
            "",
        ]
    )


_LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    # After a line's end, a bare bracket would be read as extra space.
    | {"[": "{[}"}
    # The quotes around a token's text stay straight.
    | {"'": r"\textquotesingle{}"}
)

_PAGE_LINES = 45
"""Printed lines of a float: a longer one would run off the page."""

_PAGE_CM, _CHARACTER_CM, _GAP_CM = 12.1, 0.145, 0.15
"""Width of LaTeX's article; of a character of its \\scriptsize, generously; between two columns."""

_NARROWEST_CM = 1.1
"""Of a column that wraps."""


def _latex_text(text: str) -> str:
    """Escaped; characters that LaTeX's own fonts lack become their code point."""
    known = (c if c.isascii() or c in "¶§" else f"U+{ord(c):04X}" for c in text)
    return "".join(known).translate(_LATEX_ESCAPES)


def _latex(block: TableBlock) -> str:
    r"""Floats that need `\usepackage{booktabs}` and nothing else; heads are stacked and long texts wrap."""

    def line(cells: Iterable[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    columns = list(block.table.columns)
    rows = [list(cells) for cells in block.table.itertuples(index=False)]
    stacks = [textwrap.wrap(column, 7, break_long_words=False) for column in columns]
    stacked = (r"\\".join(map(_latex_text, stack)) for stack in stacks)
    head = line(rf"\shortstack{{{text}}}" for text in stacked)
    heads = [max(map(len, stack)) for stack in stacks]
    lengths = {
        column: max(least, *(len(row[place]) for row in rows))
        for place, (column, least) in enumerate(zip(columns, heads, strict=True))
    }
    size, character_cm = _size(lengths)
    wrapped = _wrapped({column: character_cm * length for column, length in lengths.items()})
    alignment = "".join(
        rf"p{{{wrapped[c]:.1f}cm}}" if c in wrapped else "l" if c in TEXT_COLUMNS else "r" for c in columns
    )
    floats = []
    for page in _pages([_height(dict(zip(columns, row, strict=True)), wrapped, character_cm) for row in rows]):
        caption = _latex_text(block.title) + " (Continued.)" * (page.start > 0)
        floats += [
            r"\begin{table}",
            rf"\centering\{size}\sloppy\setlength{{\tabcolsep}}{{2pt}}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            head,
            r"\midrule",
            *(line(map(_latex_text, row)) for row in rows[page]),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    return "\n".join(floats)


def _size(lengths: Mapping[str, int]) -> tuple[str, float]:
    r"""The larger of \scriptsize and \tiny in which the columns fit when texts wrap; the width of its characters."""
    least = sum(
        min(_CHARACTER_CM * length, _NARROWEST_CM) if column in TEXT_COLUMNS else _CHARACTER_CM * length
        for column, length in lengths.items()
    )
    fits = least + _GAP_CM * len(lengths) <= _PAGE_CM
    return ("scriptsize", _CHARACTER_CM) if fits else ("tiny", _CHARACTER_CM * 5 / 7)


def _wrapped(natural: Mapping[str, float]) -> dict[str, float]:
    """Widths in cm of the columns of text that must wrap: the longest are cut to one length until all columns fit."""
    texts = {column: width for column, width in natural.items() if column in TEXT_COLUMNS}
    left = _PAGE_CM - _GAP_CM * len(natural) - sum(width for column, width in natural.items() if column not in texts)
    for count, column in enumerate(sorted(texts, key=texts.__getitem__)):
        # What each of those left may take, if all of them take the same.
        share = left / (len(texts) - count)
        if texts[column] > share:
            width = max(_NARROWEST_CM, share)
            return {name: width for name, whole in texts.items() if whole > width and whole >= texts[column]}
        left -= texts[column]
    return {}


def _height(row: Mapping[str, str], wrapped: Mapping[str, float], character_cm: float) -> int:
    """Printed lines of a row."""
    return max([1, *(len(textwrap.wrap(row[column], int(width / character_cm))) for column, width in wrapped.items())])


def _pages(heights: Sequence[int]) -> Iterator[slice]:
    """Which rows go into one float, by their heights in printed lines."""
    start, height = 0, 0
    for place, own in enumerate(heights):
        if height + own > _PAGE_LINES:
            yield slice(start, place)
            start, height = place, 0
        height += own
    yield slice(start, len(heights))
