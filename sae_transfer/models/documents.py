"""Documents of text, one after the other, from every kind of dataset that a study file may name, and their tokens.

Nothing is held that need not be: a dataset of the hub is streamed, parquet is read batch by batch, a text file chunk by
chunk, and whoever reads may stop at any document. A document is an iterable of chunks, so that a file of any size can
be one. A long one is tokenized in overlapping pieces, joined where the tokens of both agree, because a tokenizer needs
some hundred bytes a token while it works.
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae_transfer.errors import StudyError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

FORMATS = (".txt", ".json", ".jsonl", ".parquet")
"""Suffixes of the files that hold text."""

Document = Iterable[str]

# Piece n of a cut document begins at its character n * _PIECE_CHARS and reaches two overlaps into the next one, which
# takes over at the middle of what they share.
_PIECE_CHARS = 1 << 17
_OVERLAP_CHARS = 1 << 10
_AGREEING_TOKENS = 8
_BATCH_CHARS = 1 << 20
_DOCUMENT_CHARS = 1 << 8  # what a document counts for beside its text, so that a batch of tiny ones stays small


class Place(NamedTuple):
    """A place in a dataset: everything before it is done with."""

    document: int = 0
    """From 0; empty documents count."""
    piece: int = 0
    token: int = 0


class TokenBatch(NamedTuple):
    """Token ids of some documents, or of parts of them, in order."""

    parts: list[list[int]]
    opens: list[bool]
    """Whether a part is the beginning of a document."""
    end: Place


class _Piece(NamedTuple):
    """A stretch of a document that is tokenized in one go; nearly always all of it."""

    text: str
    document: int
    number: int
    is_last: bool


def read_documents(
    dataset: str, *, subset: str | None, split: str, column: str, revision: str | None
) -> Generator[Document, None, None]:
    """All documents of a dataset in order, read as they are asked for.

    Args:
        dataset: A file of one of `FORMATS`, a directory of such files (all of them, at any depth, sorted by path), a
            directory written by `save_to_disk` of datasets, `demo:text`, or else the id of a dataset of the hub.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset, or of a saved one that has several.
        column: The field of a row that holds its text; rows of `.json` and `.jsonl` may also be strings.
        revision: Revision of a hub dataset.

    Yields:
        The documents: a row's text, or a whole `.txt` file.

    Raises:
        StudyError: Nothing is there, or what is there cannot be read, has no such column, or is not text.
    """
    path = local_path(dataset)
    if path is None and dataset.startswith("demo:"):
        yield from map(_chunks, _demo_texts(dataset))
    elif path is None:
        yield from map(_chunks, _hub_texts(dataset, subset, split, column, revision))
    elif path.is_dir() and _is_saved_dataset(path):
        yield from map(_chunks, _saved_texts(path, split, column))
    else:
        for file in local_files(path):
            yield from _file_documents(file, column)


def token_batches(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", start: Place
) -> Iterator[TokenBatch]:
    """Token ids of documents, without special tokens of the tokenizer's own making.

    Args:
        documents: All documents of a dataset.
        tokenizer: Any; one that is not "fast" tokenizes the longest document in one go.
        start: Where to begin: a place at which an earlier batch ended. What lies before is read but not tokenized.

    Yields:
        Batches, up to the last token of the last document.
    """
    left: Encoding | None = None  # of a piece whose document goes on, not given out yet
    entry = start.token  # the first token of a piece that belongs to it and not to the one before
    for batch in _batches(_pieces(documents, start, is_cut=bool(tokenizer.is_fast))):
        encoded = tokenizer(
            [piece.text for piece in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
        parts, opens = list[list[int]](), list[bool]()
        for index, piece in enumerate(batch):
            if left is not None and encoded.encodings is not None:
                leave, following = _join(left, encoded.encodings[index])
                parts.append(left.ids[entry:leave])
                opens.append(piece.number == 1)
                left, entry = None, following
            if piece.is_last:
                parts.append(ids[index][entry:])
                opens.append(piece.number == 0)
                entry = 0
            elif encoded.encodings is not None:
                left = encoded.encodings[index]
        last = batch[-1]
        yield TokenBatch(
            parts, opens, Place(last.document + 1) if last.is_last else Place(last.document, last.number, entry)
        )


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = list[_Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + _DOCUMENT_CHARS
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(documents: Iterable[Document], start: Place, *, is_cut: bool) -> Iterator[_Piece]:
    longest = _PIECE_CHARS + 2 * _OVERLAP_CHARS if is_cut else sys.maxsize
    for index, document in enumerate(documents):
        if index < start.document:
            continue
        first = start.piece if index == start.document else 0
        number, text = 0, ""
        for chunk in document:
            text += chunk
            while len(text) > longest:
                if number >= first:
                    yield _Piece(text[:longest], index, number, is_last=False)
                number, text = number + 1, text[_PIECE_CHARS:]
        yield _Piece(text, index, number, is_last=True)


def _join(left: "Encoding", right: "Encoding") -> tuple[int, int]:
    """Where to go over from one piece's tokens to the next one's: the first token left out, the first token taken.

    That is the first token, beyond the middle of what both share, from which on both have the same few tokens at the
    same characters. Text that is cut differently for ever (a run of thousands of spaces, say) is cut at the middle.
    """
    middle, end = _OVERLAP_CHARS, 2 * _OVERLAP_CHARS  # in the characters of the right piece
    first_left, first_right = _token_at(left, _PIECE_CHARS + middle), _token_at(right, middle)
    shared = range(first_left, _token_at(left, _PIECE_CHARS + end))
    lefts = {_begin(left, token) - _PIECE_CHARS: token for token in reversed(shared)}
    left_ids, right_ids = left.ids, right.ids
    for i in range(first_right, _token_at(right, end)):
        j = lefts.get(_begin(right, i))
        if j is not None and left_ids[j : j + _AGREEING_TOKENS] == right_ids[i : i + _AGREEING_TOKENS]:
            return j, i
    return first_left, first_right


def _token_at(encoding: "Encoding", char: int) -> int:
    """The first token that begins at a character or beyond it."""
    return bisect_left(range(len(encoding)), char, key=lambda token: _begin(encoding, token))


def _begin(encoding: "Encoding", token: int) -> int:
    return (encoding.token_to_chars(token) or (0, 0))[0]  # one at a time: `offsets` makes a list of all


def local_path(dataset: str, key: str = "tokens.dataset") -> Path | None:
    """The file or directory that a dataset is, or None for what is not on this machine's disk.

    Args:
        dataset: As in the study file.
        key: Where it stands there.

    Raises:
        StudyError: It is written like a path, and nothing is there.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if path.suffix.lower() in (*FORMATS, ".npy") or dataset.startswith(("/", ".", "~")):
        raise StudyError(f"{key}: there is no file or directory {dataset}", "check the path")
    return None


def local_files(path: Path) -> list[Path]:
    """A file itself, or all files of a directory that can be read, at any depth, sorted by path.

    Raises:
        StudyError: The file has another format, or the directory holds no file that can be read.
    """
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise StudyError(f"tokens.dataset: {path} is none of {', '.join(FORMATS)}, .npy", "convert it to .jsonl")
        return [path]
    if _is_saved_dataset(path):
        return sorted(path.rglob("*.arrow"))
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FORMATS and file.is_file())
    if not files:
        raise StudyError(f"tokens.dataset: the directory {path} holds no file of {', '.join(FORMATS)}")
    return files


def _chunks(text: str) -> Document:
    """A text that is in memory already, in slices: cutting would otherwise copy a long one again and again."""
    if len(text) <= _PIECE_CHARS:
        return (text,)
    return (text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS))


def _demo_texts(dataset: str) -> Iterable[str]:
    if dataset != "demo:text":
        raise StudyError(f"tokens.dataset: there is no {dataset}", "demo:text")
    from sae_transfer.demo.text import study_documents

    return study_documents()


def _hub_texts(dataset: str, subset: str | None, split: str, column: str, revision: str | None) -> Iterator[str]:
    import datasets

    remedy = "check the id, tokens.subset, tokens.split, tokens.revision and the network, or name a local file"
    with reading(f"tokens.dataset: {dataset} from the hub", remedy):
        rows = datasets.load_dataset(dataset, subset, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, column, f"{dataset}, row {number}")


def _is_saved_dataset(directory: Path) -> bool:
    """Whether datasets' `save_to_disk` wrote this directory."""
    single = (directory / "state.json").exists() and (directory / "dataset_info.json").exists()
    return single or (directory / "dataset_dict.json").exists()


def _saved_texts(directory: Path, split: str, column: str) -> Iterator[str]:
    import datasets

    with reading(str(directory)):
        saved = datasets.load_from_disk(str(directory))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise StudyError(f"{directory}: no split {split!r}, only {', '.join(map(str, saved))}", "tokens.split")
            saved = saved[split]
        _check_column(column, saved.column_names, str(directory))
        for number, row in enumerate(saved.select_columns([column]), start=1):
            yield _text_of(row, column, f"{directory}, row {number}")


def _file_documents(file: Path, column: str) -> Iterator[Document]:
    match file.suffix.lower():
        case ".txt":
            yield _text_file_chunks(file)
        case ".json" | ".jsonl":
            yield from (_chunks(_text_of(row, column, where)) for where, row in json_rows(file))
        case ".parquet":
            yield from map(_chunks, _parquet_texts(file, column))


# utf-8-sig throughout: a byte order mark is no text, and json refuses it.
def _text_file_chunks(file: Path) -> Iterator[str]:
    with reading(str(file)), file.open(encoding="utf-8-sig") as opened:
        while chunk := opened.read(_PIECE_CHARS):
            yield chunk


def json_rows(file: Path) -> Iterator[tuple[str, object]]:
    """Rows of a `.json`, which is a list, or of a `.jsonl`, with what to call each in a message.

    Raises:
        StudyError: The file or a line of it is no JSON, or a `.json` is no list.
    """
    if file.suffix.lower() == ".jsonl":
        yield from _json_lines(file)
        return
    with reading(str(file), "if it holds one row a line, rename it to .jsonl; else check that it is whole"):
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise StudyError(f"{file}: expected a list of rows, found {kind(rows)}", "write a list, or a .jsonl")
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(file: Path) -> Iterator[tuple[str, object]]:
    with reading(str(file)), file.open(encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            with reading(f"{file}:{number}", "mend or delete that line"):
                row = json.loads(line)
            yield f"{file}:{number}", row


def _parquet_texts(file: Path, column: str) -> Iterator[str]:
    from pyarrow import parquet

    with reading(str(file)), parquet.ParquetFile(file) as table:
        _check_column(column, table.schema_arrow.names, str(file))
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text_of(value, column, f"{file}, row {number}")


@contextmanager
def reading(where: str, remedy: str = "check that it is whole and in the format that its name says") -> Iterator[None]:
    """Turn whatever reading raises into one problem of `where`.

    Exception, because what lies below (file systems, codecs, arrow, HTTP clients) shares no narrower class.
    """
    try:
        yield
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(f"{where}: cannot be read: {type(error).__name__}: {error}", remedy) from error


def _text_of(row: object, column: str, where: str) -> str:
    """The text of a row, which is a mapping or the text itself."""
    if isinstance(row, Mapping):
        _check_column(column, row, where)
        row = row[column]
    if not isinstance(row, str):
        raise StudyError(f"{where}: expected text in the column {column!r}, found {kind(row)}", "set tokens.column")
    return row.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, which no tokenizer takes


def _check_column(column: str, found: Collection[str], where: str) -> None:
    if column not in found:
        raise StudyError(f"{where}: no column {column!r}, only {', '.join(found)}", "set tokens.column to one of them")


def kind(value: object) -> str:
    """What a value of the wrong kind is, in a few words."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
