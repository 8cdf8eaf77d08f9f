"""Text or token ids -> held-out and training sequences `[seq pos]`, fingerprinted, on disk.

Tokens are made once, with the base model's tokenizer, and every cell of a study sees the same ones. Text is packed as
it is read; the rows go to `partial/`, beside a state that is saved every few seconds, so that an interrupted
tokenization goes on where it was. Memory does not grow with the number of tokens.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.models.documents import (
    Document,
    Place,
    TokenBatch,
    local_files,
    local_path,
    read_documents,
    token_batches,
)
from sae_transfer.study import digest, replacing, write_json
from sae_transfer.throughput import TOKENS, Throughput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Separator = Literal["bos", "eos", "none"]
Progress = Callable[[int, int], None]
"""Told the rows made so far, and the rows wanted."""

_RECORD = "tokens.json"
_SAVE_EVERY_S = 5.0
_CHUNK_TOKENS = 1 << 20
"""Tokens in memory at once when rows are copied."""

_TEXT, _OPENS_DOCUMENT, _SEPARATOR = 0, 1, 2  # what a token of the stream is


@dataclass(frozen=True, eq=False)
class TokenSet:
    """The token sequences of a study, memory-mapped.

    Attributes:
        evaluation: Ids `[seq pos]` that no SAE is trained on.
        training: Ids `[seq pos]`, none of them rows of `evaluation`.
        bos_token_id: The id of BOS; None where the tokenizer has none and the packing needed none.
        fingerprint: Sha256 (hex) of the ids, the shapes and the BOS id.
        n_documents: Documents that the sequences were made of; None for ids that were given.
        dataset: What the study file calls their source.
    """

    evaluation: NDArray[np.unsignedinteger]
    training: NDArray[np.unsignedinteger]
    bos_token_id: int | None
    fingerprint: str
    n_documents: int | None
    dataset: str

    @property
    def context_size(self) -> int:
        """Tokens of a sequence, BOS included."""
        return self.evaluation.shape[1]


def build_token_set(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    dataset: str,
    subset: str | None,
    split: str,
    column: str,
    revision: str | None,
    context_size: int,
    prepend_bos: bool,
    bos_token: str | None,
    separator: Separator,
    seed: int,
    n_evaluation_tokens: int,
    n_training_tokens: int,
    vocab_size: int | None = None,
    progress: Progress | None = None,
    throughput: Throughput | None = None,
) -> TokenSet:
    """Make a token set and write it; one that was there is replaced.

    Text is packed as SAELens's `concat_and_batch_sequences` packs it: documents with a separator between them, in rows
    that begin with BOS. As there, a separator at the start of a row is left out, no separator comes before a document
    that begins with one, and BOS is not put before a text token that is BOS already. The rows are shuffled.
    Ids of a `.npy` are taken as they are and in their order, whatever context size and packing are asked for.

    Args:
        directory: Where to. An interrupted call leaves `partial/` there, with which the next one goes on.
        tokenizer: The base model's; None where it has none, which ids that are given can do without.
        dataset: A `.npy` of ids `[seq pos]`, or what `read_documents` takes.
        subset: As in `read_documents`; so are the next three.
        split: See `subset`.
        column: See `subset`.
        revision: See `subset`.
        context_size: Tokens of a row, BOS included.
        prepend_bos: Whether every row begins with BOS.
        bos_token: The token to use as BOS instead of the tokenizer's own.
        separator: What stands between two documents.
        seed: Of the order of the rows.
        n_evaluation_tokens: Tokens to hold out, rounded down to whole rows.
        n_training_tokens: Tokens to train on, rounded up to whole rows.
        vocab_size: How many ids the models have an embedding for, which bounds those of a `.npy`; None: as many as the
            tokenizer has.
        progress: Called after every batch of documents.
        throughput: Where to count what is read and packed here; ids that are given are not.

    Raises:
        StudyError: The dataset or a row of it cannot be used, it has too few tokens, the tokenizer lacks a token, or
            the directory cannot be written.
    """
    source = local_path(dataset)
    n_ids = vocab_size or 2**32 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    if source is not None and source.suffix.lower() == ".npy":
        ids = _open_ids(source)
        wanted = _wanted(n_evaluation_tokens, n_training_tokens, ids.shape[1])
        if len(ids) < wanted.n_rows:
            raise _too_few(dataset, wanted, ids.size)
        _check_ids(source, wanted, vocab_size or n_ids)
        bos = None if tokenizer is None else _bos_if_any(tokenizer, bos_token)
        rows = _Rows(partial(_read_ids, source), np.arange(wanted.n_rows), _dtype(vocab_size or n_ids))
        return _write(directory, rows, wanted, bos, None, dataset)

    if tokenizer is None:
        raise StudyError(
            "pair.base: the base model has no tokenizer, and the dataset is text",
            "put tokenizer.json and tokenizer_config.json beside its config.json, or give token ids (.npy)",
        )
    wanted = _wanted(n_evaluation_tokens, n_training_tokens, context_size)
    needs_bos = prepend_bos or separator == "bos"
    bos = bos_token_id(tokenizer, bos_token) if needs_bos else _bos_if_any(tokenizer, bos_token)
    if separator == "eos" and tokenizer.eos_token_id is None:
        raise StudyError("tokens.separator: the tokenizer has no eos token", "bos or none")
    between = {"bos": bos, "eos": tokenizer.eos_token_id, "none": None}[separator]
    packing = _Packing(context_size, bos if prepend_bos else None, between)
    settings = {
        "source": [dataset, subset, split, column, revision],
        "files": [] if source is None else [_stamp(file) for file in local_files(source)],
        "packing": packing,
        "vocabulary": tokenizer.get_vocab(),
    }
    documents = read_documents(dataset, subset=subset, split=split, column=column, revision=revision)
    growing = _GrowingRows(directory / "partial", digest(settings), _dtype(n_ids), packing)
    with closing(documents):
        state = growing.fill(documents, tokenizer, wanted.n_rows, progress, throughput or Throughput())
    if state.n_rows < wanted.n_rows:
        growing.remove()
        raise _too_few(dataset, wanted, state.n_rows * context_size + len(state.left.ids))
    order = np.random.default_rng(seed).permutation(wanted.n_rows)
    rows = _Rows(growing.read, order, growing.dtype)
    token_set = _write(directory, rows, wanted, bos, state.n_documents, dataset)
    growing.remove()
    return token_set


def load_token_set(directory: Path) -> TokenSet:
    """Open a token set without reading it.

    Raises:
        StudyError: There is none, or a file of it is missing, cut off or of another shape than recorded.
    """
    remedy = f"delete {directory} and run again"
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        arrays = {}
        for name, n_sequences in record["n_sequences"].items():
            # a mapping cannot be empty
            array = np.load(directory / f"{name}.npy", mmap_mode="r" if n_sequences else None, allow_pickle=False)
            expected = (n_sequences, record["context_size"]), record["dtype"]
            if (array.shape, array.dtype.str) != expected:
                raise ValueError(f"{name}.npy is {array.shape} {array.dtype.str} instead of {expected}")
            arrays[name] = array
        return TokenSet(
            evaluation=arrays["evaluation"],
            training=arrays["training"],
            bos_token_id=record["bos_token_id"],
            fingerprint=record["fingerprint"],
            n_documents=record["n_documents"],
            dataset=record["dataset"],
        )
    except FileNotFoundError as error:
        raise StudyError(f"{error.filename}: there is no whole token set in {directory}", remedy) from error
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise StudyError(f"{directory}: the token set is damaged: {error}", remedy) from error


def bos_token_id(tokenizer: "PreTrainedTokenizerBase", bos_token: str | None) -> int:
    """The id of BOS: of the token named, else the tokenizer's bos, else its eos.

    Raises:
        StudyError: The tokenizer has neither, or what is named is not exactly one token of it.
    """
    if bos_token is None:
        for own in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if isinstance(own, int):
                return own
        raise StudyError("tokens.bos_token: the tokenizer has neither a bos nor an eos token", "name one")
    known = tokenizer.get_vocab()
    if bos_token in known:
        return known[bos_token]
    ids = tokenizer.encode(bos_token, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    is_unknown = len(ids) < 2
    specials = [str(token) for token in tokenizer.all_special_tokens]
    close = difflib.get_close_matches(bos_token, specials, n=3) or specials[:5]
    raise StudyError(
        f"tokens.bos_token: {bos_token!r} is "
        + ("unknown to the tokenizer" if is_unknown else f"{len(ids)} tokens and not one"),
        f"one of its special tokens, such as {', '.join(close)}" if close else None,
    )


def _bos_if_any(tokenizer: "PreTrainedTokenizerBase", bos_token: str | None) -> int | None:
    if bos_token is None and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        return None
    return bos_token_id(tokenizer, bos_token)


class _Wanted(NamedTuple):
    context_size: int
    n_evaluation: int
    """Rows, as is `n_rows`."""
    n_rows: int
    """Evaluation and training together."""


def _wanted(n_evaluation_tokens: int, n_training_tokens: int, context_size: int) -> _Wanted:
    if context_size < 2:
        raise StudyError(f"tokens: a sequence of {context_size} tokens has no next token", "at least 2")
    n_evaluation = n_evaluation_tokens // context_size
    if n_evaluation == 0:
        raise StudyError(
            f"evaluate.tokens: {n_evaluation_tokens} tokens are less than one sequence of {context_size}",
            "raise evaluate.tokens or lower tokens.context_size",
        )
    return _Wanted(context_size, n_evaluation, n_evaluation + math.ceil(n_training_tokens / context_size))


def _too_few(dataset: str, wanted: _Wanted, n_tokens: int) -> StudyError:
    if n_tokens == 0:
        return StudyError(f"tokens.dataset: {dataset} is empty", "name another dataset, or another tokens.column")
    size, n_evaluation, n_rows = wanted
    return StudyError(
        f"tokens.dataset: {dataset} holds {n_tokens} tokens, which is {n_tokens // size} sequences of {size};"
        f" asked for are {n_evaluation} ({n_evaluation * size} tokens) for evaluation"
        f" and {n_rows - n_evaluation} ({(n_rows - n_evaluation) * size} tokens) for training",
        "lower evaluate.tokens, train.tokens, train.scale_tokens or finetune.tokens, lower tokens.context_size,"
        " or name a larger dataset",
    )


def _stamp(file: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


def _dtype(n_ids: int) -> np.dtype[Any]:
    return np.dtype("<u2" if n_ids <= 1 << 16 else "<u4")


def _open_ids(file: Path) -> NDArray[np.integer]:
    """The array of a `.npy`, memory-mapped."""
    try:
        ids = np.lib.format.open_memmap(file, mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise StudyError(f"{file}: is no whole array of token ids: {error}", "write it with numpy.save") from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} of shape {list(ids.shape)}"
        raise StudyError(f"{file}: expected integers [seq pos], found {found}", "save it as such")
    return ids


def _read_ids(file: Path, places: NDArray[np.integer]) -> NDArray[np.integer]:
    # mapped anew each time: pages that were read stay with the process until the mapping is closed
    return np.asarray(_open_ids(file)[places])


def _check_ids(file: Path, wanted: _Wanted, n_ids: int) -> None:
    step = max(1, _CHUNK_TOKENS // wanted.context_size)
    for start in range(0, wanted.n_rows, step):
        signals.check()
        chunk = _read_ids(file, np.arange(start, min(start + step, wanted.n_rows)))
        wrong = np.argwhere((chunk < 0) | (chunk >= n_ids))
        if len(wrong):
            row, position = wrong[0]
            raise StudyError(
                f"{file}: id {chunk[row, position]} in row {start + row} is not below the vocabulary's {n_ids}",
                "make the ids with the base model's tokenizer",
            )


class _Packing(NamedTuple):
    context_size: int
    bos: int | None
    """First token of every row, or None."""
    separator: int | None
    """Token between documents, or None."""


class _Stream(NamedTuple):
    """Tokens that follow one another: documents, with separators before them."""

    ids: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    """`_TEXT`, `_OPENS_DOCUMENT` or `_SEPARATOR`."""

    def followed_by(self, batch: TokenBatch, separator: int | None) -> "_Stream":
        """This stream and then a batch. The first document has its separator too: at the start of a row it goes."""
        lengths = np.array([len(part) for part in batch.parts])
        ids = np.fromiter(chain.from_iterable(batch.parts), np.uint32, int(lengths.sum()))
        opening = (lengths.cumsum() - lengths)[np.array(batch.opens) & (lengths > 0)]
        kinds = np.full(len(ids), _TEXT, np.uint8)
        kinds[opening] = _OPENS_DOCUMENT
        if separator is not None:
            opening = opening[ids[opening] != separator]
            ids, kinds = np.insert(ids, opening, separator), np.insert(kinds, opening, _SEPARATOR)
        return _Stream(np.concatenate([self.ids, ids]), np.concatenate([self.kinds, kinds]))

    def cut(self, packing: _Packing, at_most: int) -> "_Cut":
        """Cut whole rows off the front."""
        begins = list[int]()
        at, n = 0, len(self.ids)
        while len(begins) < at_most:
            if at < n and self.kinds[at] == _SEPARATOR:
                at += 1
            lacks_bos = packing.bos is not None and at < n and self.ids[at] != packing.bos
            begin = at - lacks_bos  # one early, on a token that BOS is written over below
            if begin + packing.context_size > n:
                break
            begins.append(begin)
            at = begin + packing.context_size
        padded = np.pad(self.ids, (1, packing.context_size))  # so that there is a window even without a row
        windows = np.lib.stride_tricks.sliding_window_view(padded, packing.context_size)
        rows = windows[np.array(begins, int) + 1]
        if packing.bos is not None:
            rows[:, 0] = packing.bos
        n_documents = int((self.kinds[:at] == _OPENS_DOCUMENT).sum())
        return _Cut(rows, n_documents, _Stream(self.ids[at:], self.kinds[at:]))


class _Cut(NamedTuple):
    rows: NDArray[np.uint32]
    """`[seq pos]`"""
    n_documents: int
    """How many begin in the rows."""
    left: _Stream


class _State(NamedTuple):
    """How far a tokenization has come."""

    n_rows: int
    n_documents: int
    """How many begin in the rows."""
    left: _Stream
    """Read, and in no row yet."""
    end: Place


class _GrowingRows:
    """Packed rows that grow on disk, in `rows.bin`, and the state that goes with them, in `state.json`."""

    def __init__(self, directory: Path, settings: str, dtype: np.dtype[Any], packing: _Packing) -> None:
        self.directory = directory
        self.settings = settings
        self.dtype = dtype
        self.packing = packing

    def fill(
        self,
        documents: Iterator[Document],
        tokenizer: "PreTrainedTokenizerBase",
        n_rows: int,
        progress: Progress | None,
        throughput: Throughput,
    ) -> _State:
        """Read documents until there are `n_rows` rows, or no more documents."""
        state = self._resumed(n_rows)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with throughput.timing(TOKENS), (self.directory / "rows.bin").open("ab") as file:
                file.truncate(state.n_rows * self._row_bytes)
                saved_at = time.monotonic()
                try:
                    for batch in token_batches(documents, tokenizer, state.end):
                        stream = state.left.followed_by(batch, self.packing.separator)
                        rows, n_documents, left = stream.cut(self.packing, n_rows - state.n_rows)
                        file.write(rows.astype(self.dtype).tobytes())
                        throughput.count(TOKENS, rows.size)
                        state = _State(state.n_rows + len(rows), state.n_documents + n_documents, left, batch.end)
                        if progress is not None:
                            progress(state.n_rows, n_rows)
                        signals.check()
                        if state.n_rows == n_rows:
                            break
                        if time.monotonic() - saved_at >= _SAVE_EVERY_S:
                            self._save(state, file)
                            saved_at = time.monotonic()
                except BaseException:
                    self._save(state, file)
                    raise
        except OSError as error:
            raise StudyError(
                f"{self.directory}: cannot be written ({error.strerror or error})",
                "check free space and permissions, or choose another place with --out DIR",
            ) from error
        return state

    def read(self, places: NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        """The rows `[seq pos]` at some places, by reads: scattered ones of a mapping would pull in most of the file."""
        rows = np.empty((len(places), self.packing.context_size), self.dtype)
        with (self.directory / "rows.bin").open("rb", buffering=0) as file:
            for row, place in zip(rows, places.tolist(), strict=True):
                file.seek(place * self._row_bytes)
                file.readinto(row.data)
        return rows

    def remove(self) -> None:
        """Delete rows and state, once they are of no more use."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _row_bytes(self) -> int:
        return self.packing.context_size * self.dtype.itemsize

    def _save(self, state: _State, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())  # before the state that counts on these rows
        left = {name: column.tolist() for name, column in state.left._asdict().items()}
        write_json(self.directory / "state.json", {"settings": self.settings, **state._asdict(), "left": left})

    def _resumed(self, n_rows: int) -> _State:
        """The state on disk, or the beginning where there is none that leads to these rows."""
        try:
            record = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
            n_bytes = (self.directory / "rows.bin").stat().st_size
            left = _Stream(np.array(record["left"]["ids"], np.uint32), np.array(record["left"]["kinds"], np.uint8))
            state = _State(record["n_rows"], record["n_documents"], left, Place(*record["end"]))
            if record["settings"] == self.settings and state.n_rows <= min(n_rows, n_bytes // self._row_bytes):
                logger.info("tokens: going on after %d rows and %d documents", state.n_rows, state.end.document)
                return state
        except (OSError, ValueError, KeyError):
            pass  # it only saves time
        return _State(0, 0, _Stream(np.empty(0, np.uint32), np.empty(0, np.uint8)), Place())


class _Rows(NamedTuple):
    """Rows to be written."""

    read: Callable[[NDArray[np.integer]], NDArray[np.integer]]
    """Gives the rows `[seq pos]` at some places."""
    order: NDArray[np.integer]
    """Their places, evaluation rows first."""
    dtype: np.dtype[Any]

    def write(self, file: Path, chosen: slice, context_size: int, ids_hash: "hashlib._Hash") -> None:
        """Write a `.npy` of some rows, and update the hash with their ids as little-endian uint32."""
        order = self.order[chosen]
        with replacing(file) as temporary, temporary.open("wb") as out:
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": (len(order), context_size)}
            np.lib.format.write_array_header_1_0(out, header)
            step = max(1, _CHUNK_TOKENS // context_size)
            for start in range(0, len(order), step):
                signals.check()
                rows = self.read(order[start : start + step])
                out.write(rows.astype(self.dtype).tobytes())
                ids_hash.update(rows.astype("<u4").tobytes())


def _write(
    directory: Path, rows: _Rows, wanted: _Wanted, bos: int | None, n_documents: int | None, dataset: str
) -> TokenSet:
    """Write the arrays, and last the record that says they are whole."""
    (directory / _RECORD).unlink(missing_ok=True)
    n_sequences = {"evaluation": wanted.n_evaluation, "training": wanted.n_rows - wanted.n_evaluation}
    ids_hash = hashlib.sha256(json.dumps([wanted.context_size, n_sequences, bos]).encode())
    for name, chosen in (("evaluation", slice(wanted.n_evaluation)), ("training", slice(wanted.n_evaluation, None))):
        rows.write(directory / f"{name}.npy", chosen, wanted.context_size, ids_hash)
    record = {
        "dataset": dataset,
        "fingerprint": ids_hash.hexdigest(),
        "bos_token_id": bos,
        "n_documents": n_documents,
        "context_size": wanted.context_size,
        "n_sequences": n_sequences,
        "dtype": rows.dtype.str,
    }
    write_json(directory / _RECORD, record)
    return load_token_set(directory)
