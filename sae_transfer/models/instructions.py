"""Instructions from every kind of dataset that a study file may name, and answers to them that were given.

A row is a line of text, has the columns of alpaca (`instruction`, `input`), or is a conversation (`messages`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae_transfer.errors import StudyError
from sae_transfer.models.documents import FORMATS, json_rows, kind, local_path, reading


@dataclass(frozen=True)
class Instructions:
    """What was drawn from a dataset.

    Attributes:
        texts: The instructions, in the order in which they were drawn.
        n_drawn: Rows drawn.
        n_with_input: Rows of these that were dropped because they have an input.
    """

    texts: tuple[str, ...]
    n_drawn: int
    n_with_input: int


class Exchange(NamedTuple):
    """An instruction and the answer to it."""

    instruction: str
    completion: str


class _Rows(NamedTuple):
    """Rows of a dataset, looked at one by one."""

    n: int
    at: Callable[[int], object]
    where: Callable[[int], str]
    """What to call a row in a message."""


def read_instructions(dataset: str, *, n: int, seed: int) -> Instructions:
    """Draw rows of a dataset, then drop those with an input.

    The post's order of things: 100 rows of alpaca drawn with seed 42, 55 of them left. How it drew is not published, so
    the same seed gives other rows here: those of numpy's `default_rng(seed).choice` without replacement.

    Args:
        dataset: A file of `.json` (a list), `.jsonl`, `.parquet` or `.txt`, `demo:instructions`, or else the id of a
            hub dataset, whose split `train` is taken. A row is text (a line of a `.txt` that is not blank), or has
            `instruction` and maybe `input`, or has `messages`: of these the first of the role `user` is the
            instruction, and all others, a system message too, are left out.
        n: Rows to draw; a dataset that has no more gives all of them, in its own order.
        seed: Of the draw.

    Returns:
        The instructions, as they are written: spaces at their ends stay.

    Raises:
        StudyError: Nothing is there or it cannot be read, it is empty, a row drawn is none of these forms or its
            instruction is blank, or every row drawn has an input.
    """
    rows = _open(dataset)
    if rows.n == 0:
        raise StudyError(f"instruct.dataset: {dataset} is empty", "name another dataset")
    drawn = range(rows.n) if rows.n <= n else np.random.default_rng(seed).choice(rows.n, n, replace=False).tolist()
    texts = [text for index in drawn if (text := _instruction(rows.at(index), rows.where(index))) is not None]
    if not texts:
        raise StudyError(
            f"instruct.dataset: none of the {len(drawn)} rows drawn from {dataset} is without an input",
            "raise instruct.n, change instruct.seed or name another dataset",
        )
    return Instructions(tuple(texts), len(drawn), len(drawn) - len(texts))


def read_exchanges(path: Path) -> list[Exchange]:
    """Read the instructions and answers that `instruct.rollouts` names: all of them, in order.

    Args:
        path: A `.jsonl` (or a `.json` list) of rows with `instruction` and `completion`.

    Raises:
        StudyError: It is not there, cannot be read, is empty, or a row lacks one of the two texts.
    """
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise StudyError(f"instruct.rollouts: {path} is no .jsonl", "one object of instruction and completion a line")
    if not path.is_file():
        raise StudyError(f"instruct.rollouts: there is no file {path}", "check the path")
    exchanges = []
    for where, row in json_rows(path):
        fields = row if isinstance(row, Mapping) else {}
        if not {"instruction", "completion"} <= fields.keys():
            found = f"only {', '.join(map(str, fields))}" if fields else kind(row)
            raise StudyError(
                f"instruct.rollouts: {where}: expected the fields instruction and completion, found {found}",
                "rename the fields",
            )
        instruction = _text(fields["instruction"], f"{where}, instruction")
        exchanges.append(Exchange(instruction, _text(fields["completion"], f"{where}, completion", may_be_blank=True)))
    if not exchanges:
        raise StudyError(f"instruct.rollouts: {path} is empty", "leave it out to have the chat model answer")
    return exchanges


def _open(dataset: str) -> _Rows:
    path = local_path(dataset, "instruct.dataset")
    if path is None:
        return _demo_rows(dataset) if dataset.startswith("demo:") else _hub_rows(dataset)
    if path.suffix.lower() not in FORMATS or not path.is_file():
        raise StudyError(f"instruct.dataset: {path} is no file of {', '.join(FORMATS)}", "name one of these")
    match path.suffix.lower():
        case ".txt":
            with reading(str(path)):
                lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at more than lines
            return _listed([(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()])
        case ".parquet":
            return _parquet_rows(path)
        case _:
            return _listed(list(json_rows(path)))


def _listed(named: Sequence[tuple[str, object]]) -> _Rows:
    return _Rows(len(named), lambda index: named[index][1], lambda index: named[index][0])


def _demo_rows(dataset: str) -> _Rows:
    if dataset != "demo:instructions":
        raise StudyError(f"instruct.dataset: there is no {dataset}", "demo:instructions")
    from sae_transfer.demo.text import study_instructions

    rows = study_instructions()
    return _Rows(len(rows), rows.__getitem__, partial(_name, dataset))


def _parquet_rows(file: Path) -> _Rows:
    from pyarrow import parquet

    with reading(str(file)):
        table = parquet.read_table(file)
    return _Rows(len(table), lambda index: table.slice(index, 1).to_pylist()[0], partial(_name, str(file)))


def _hub_rows(dataset: str) -> _Rows:
    import datasets

    remedy = "check the id and the network, or name a local file; a hub dataset needs a split called train"
    with reading(f"instruct.dataset: {dataset} from the hub", remedy):
        rows = datasets.load_dataset(dataset, split="train")
    return _Rows(len(rows), rows.__getitem__, partial(_name, dataset))


def _name(dataset: str, index: int) -> str:
    return f"{dataset}, row {index + 1}"


def _instruction(row: object, where: str) -> str | None:
    """The instruction of a row, or None for one that has an input."""
    if isinstance(row, Mapping):
        if "instruction" in row:
            given = row.get("input")
            return None if isinstance(given, str) and given.strip() else _text(row["instruction"], where)
        if "messages" in row:
            return _text(_first_of_user(row["messages"], where), where)
        raise StudyError(
            f"instruct.dataset: {where}: neither instruction nor messages, only {', '.join(map(str, row))}",
            "rename the column that holds the instructions to instruction",
        )
    return _text(row, where)


def _first_of_user(messages: object, where: str) -> object:
    listed = messages if isinstance(messages, list) else []
    if not listed or not all(isinstance(message, Mapping) for message in listed):
        raise StudyError(
            f"instruct.dataset: {where}: expected messages to be a list of role and content, found {kind(messages)}",
            "write conversations as a list of objects",
        )
    for message in listed:
        if message.get("role") == "user":
            return message.get("content")
    roles = ", ".join(str(message.get("role")) for message in listed)
    raise StudyError(f"instruct.dataset: {where}: no message of the role user, only {roles}", "mend or delete that row")


def _text(value: object, where: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str) or not (may_be_blank or value.strip()):
        raise StudyError(f"instruct: {where}: expected text, found {kind(value)}", "mend or delete that row")
    return value.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, which no tokenizer takes
