import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_transfer.demo import text as demo_text
from sae_transfer.errors import StudyError
from sae_transfer.models import documents as documents_module
from sae_transfer.models import tokens as tokens_module
from sae_transfer.models.tokens import TokenSet, bos_token_id, build_token_set, load_token_set
from tests.checkpoints import WORDS, make_tokenizer, words_of

BOS, EOS = 0, 1
DOCUMENTS = [words_of(seed, 5 + seed % 40) for seed in range(120)]

tokenizer = cache(make_tokenizer)


def build(directory: Path, dataset: object, **changes: Any) -> TokenSet:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "dataset": str(dataset),
        "subset": None,
        "split": "train",
        "column": "text",
        "revision": None,
        "context_size": 16,
        "prepend_bos": True,
        "bos_token": None,
        "separator": "bos",
        "seed": 0,
        "n_evaluation_tokens": 160,
        "n_training_tokens": 640,
    }
    return build_token_set(directory, **{**arguments, **changes})


def in_order(token_set: TokenSet, seed: int = 0) -> np.ndarray:
    """All rows as they were before they were shuffled."""
    rows = np.concatenate([token_set.evaluation, token_set.training])
    return rows[np.argsort(np.random.default_rng(seed).permutation(len(rows)))]


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def write_json(path: Path, documents: list[str]) -> Path:
    path.write_text(json.dumps([{"text": document} for document in documents]))
    return path


def write_strings(path: Path, documents: list[str]) -> Path:
    path.write_text(json.dumps(documents))
    return path


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(json.dumps({"id": 1, "text": document}) for document in documents) + "\n")
    return path


def write_parquet(path: Path, documents: list[str]) -> Path:
    parquet.write_table(pa.table({"id": range(len(documents)), "text": documents}), path, row_group_size=7)
    return path


def write_directory(path: Path, documents: list[str]) -> Path:
    (path / "b").mkdir(parents=True)
    (path / "notes.md").write_text("not text of the dataset")
    write_parquet(path / "a.parquet", documents[:20])
    for number, document in enumerate(documents[20:]):
        (path / "b" / f"{number:03}.txt").write_text(document)
    return path


def write_saved(path: Path, documents: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": documents, "id": range(len(documents))}).save_to_disk(path)
    return path


def write_saved_splits(path: Path, documents: list[str]) -> Path:
    halves = {"test": documents[::-1], "train": documents}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in halves.items()}).save_to_disk(path)
    return path


SOURCES: dict[str, Callable[[Path, list[str]], Path]] = {
    "rows.json": write_json,
    "strings.json": write_strings,
    "rows.jsonl": write_jsonl,
    "rows.parquet": write_parquet,
    "directory": write_directory,
    "saved": write_saved,
    "splits": write_saved_splits,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_the_same_documents_gives_the_same_tokens(tmp_path: Path, name: str) -> None:
    expected = build(tmp_path / "expected", write_json(tmp_path / "plain.json", DOCUMENTS))
    built = build(tmp_path / "tokens", SOURCES[name](tmp_path / name, DOCUMENTS))
    assert built.fingerprint == expected.fingerprint
    assert built.n_documents == expected.n_documents
    np.testing.assert_array_equal(built.training, expected.training)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "\n".join(DOCUMENTS) + " § übrig 🙂"
    (tmp_path / "book.txt").write_text("\ufeff" + text, encoding="utf-8")
    ids = ids_of(text)
    n_rows = len(ids) // 15
    built = build(tmp_path / "t", tmp_path / "book.txt", n_training_tokens=(n_rows - 10) * 16)
    np.testing.assert_array_equal(in_order(built)[:, 1:].ravel(), ids[: n_rows * 15])
    assert built.n_documents == 1


def test_rows_packed_by_hand(tmp_path: Path) -> None:
    a, b, c = (ids_of(text) for text in ("the cat sat", "a mat", "old men sing of ships"))
    assert (len(a), len(b)) == (5, 3)
    # the first separator fits into the second row; the second would begin the fourth
    expected = [[BOS, *a[:3]], [BOS, *a[3:], BOS], [BOS, *b], [BOS, *c[:3]]]
    source = write_json(tmp_path / "d.json", ["the cat sat", "a mat", "", "old men sing of ships"])
    built = build(tmp_path / "t", source, context_size=4, n_evaluation_tokens=4, n_training_tokens=12)
    np.testing.assert_array_equal(in_order(built), expected)
    assert built.n_documents == 3


@pytest.mark.parametrize("separator", ["bos", "eos", "none"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_rows_are_those_of_saelens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, prepend_bos: bool
) -> None:
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    monkeypatch.setattr(documents_module, "_BATCH_CHARS", 1500)  # several batches, with something left over from each
    generator = np.random.default_rng(0)
    pieces = [*WORDS, "<s>", "</s>", "</s></s>"]  # texts with BOS and EOS in them, also where rows and documents begin
    documents = ["".join(generator.choice(pieces, n)) for n in generator.integers(0, 12, 400)]
    ids = [torch.tensor(ids_of(document), dtype=torch.long) for document in documents]
    rows = concat_and_batch_sequences(
        iter(ids),
        context_size=9,
        begin_batch_token_id=BOS if prepend_bos else None,
        sequence_separator_token_id={"bos": BOS, "eos": EOS, "none": None}[separator],
    )
    expected = torch.stack(list(rows)).numpy()
    built = build(
        tmp_path / "t",
        write_json(tmp_path / "d.json", documents),
        context_size=9,
        separator=separator,
        prepend_bos=prepend_bos,
        n_evaluation_tokens=90,
        n_training_tokens=expected.size - 90,
    )
    np.testing.assert_array_equal(in_order(built), expected)


def test_evaluation_and_training_share_no_row_and_make_up_what_was_packed(tmp_path: Path) -> None:
    source = write_json(tmp_path / "d.json", DOCUMENTS)
    built = build(tmp_path / "t", source, n_evaluation_tokens=175, n_training_tokens=641)
    assert built.evaluation.shape == (10, 16)
    assert built.training.shape == (41, 16)
    rows = [row.tobytes() for row in [*built.evaluation, *built.training]]
    assert len(set(rows)) == 51
    assert in_order(built)[0].tolist() == [BOS, *ids_of(DOCUMENTS[0]), BOS, *ids_of(DOCUMENTS[1])][:16]


def test_the_seed_orders_the_rows_and_changes_the_fingerprint(tmp_path: Path) -> None:
    source = write_json(tmp_path / "d.json", DOCUMENTS)
    first, again = build(tmp_path / "a", source), build(tmp_path / "b", source)
    other = build(tmp_path / "c", source, seed=1)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    np.testing.assert_array_equal(in_order(first), in_order(other, seed=1))


def test_ids_are_kept_in_two_bytes_where_they_fit(tmp_path: Path) -> None:
    source = write_json(tmp_path / "d.json", DOCUMENTS)
    assert build(tmp_path / "a", source).training.dtype == np.uint16
    large = make_tokenizer()
    large.add_tokens([f"<{n}>" for n in range(1 << 16)])
    wide = build(tmp_path / "b", source, tokenizer=large)
    assert wide.training.dtype == np.uint32
    assert wide.fingerprint == load_token_set(tmp_path / "a").fingerprint


def test_a_study_that_trains_nothing_needs_no_training_tokens(tmp_path: Path) -> None:
    built = build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS), n_training_tokens=0)
    assert built.training.shape == (0, 16)
    assert load_token_set(tmp_path / "t").fingerprint == built.fingerprint
    assert built.context_size == 16


def test_progress_ends_with_all_rows(tmp_path: Path) -> None:
    told = []
    build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS), progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (50, 50)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["evaluation.npy", "tokens.json", "training.npy"]


def test_the_demos_own_text_is_a_dataset(tmp_path: Path) -> None:
    built = build(tmp_path / "t", "demo:text", context_size=128, n_evaluation_tokens=1280, n_training_tokens=1280)
    assert built.dataset == "demo:text"
    assert built.training.shape == (10, 128)


def test_a_hub_dataset_is_streamed_and_reading_stops_when_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = 0

    def rows() -> Iterator[dict[str, object]]:
        nonlocal pulled
        for number in range(100_000):
            pulled += 1
            yield {"text": words_of(number, 30), "meta": number}

    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.IterableDataset:
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(documents_module, "_BATCH_CHARS", 3000)
    built = build(tmp_path / "t", "someone/texts", subset="small", split="validation", revision="abc")
    assert asked == [
        (("someone/texts", "small"), {"split": "validation", "revision": "abc", "streaming": True}),
    ]
    assert built.n_documents is not None
    assert built.n_documents <= pulled < built.n_documents + 40


def test_a_hub_dataset_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("Dataset 'someone/texts' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(StudyError, match=r"someone/texts from the hub.*doesn't exist"):
        build(tmp_path / "t", "someone/texts")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_PIECE_CHARS", 400)
    monkeypatch.setattr(documents_module, "_OVERLAP_CHARS", 100)
    monkeypatch.setattr(documents_module, "_BATCH_CHARS", 3000)


class CountingTokenizer(PreTrainedTokenizerFast):
    seen: list[str]

    def __call__(self, text: Any = None, *arguments: Any, **options: Any) -> Any:
        self.seen.extend(text)
        return super().__call__(text, *arguments, **options)


def counting_tokenizer() -> CountingTokenizer:
    counting = CountingTokenizer(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    counting.seen = []
    return counting


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("stop", [1, 7, 40, 41, 42, 90])
def test_an_interrupted_tokenization_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    # Document 40 takes many batches; the interruption at 41 comes while pieces of it are waiting.
    texts = [*DOCUMENTS[:40], words_of(7, 6000), *DOCUMENTS[40:]]
    n_training = 16 * (sum(len(ids_of(text)) for text in texts) // 15 - 20)
    whole = build(tmp_path / "whole", write_json(tmp_path / "d.json", texts), n_training_tokens=n_training)

    def until(n: int) -> Iterator[str]:
        yield from texts[:n]
        if n < len(texts):
            raise KeyboardInterrupt

    monkeypatch.setattr(demo_text, "study_documents", lambda: until(stop))
    first, second = counting_tokenizer(), counting_tokenizer()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "t", "demo:text", n_training_tokens=n_training, tokenizer=first)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["partial"]
    document, piece, _ = json.loads((tmp_path / "t" / "partial" / "state.json").read_text())["end"]
    assert (document == 40 and piece > 0) == (stop in (41, 42))
    with pytest.raises(StudyError, match="there is no whole token set"):
        load_token_set(tmp_path / "t")

    monkeypatch.setattr(demo_text, "study_documents", lambda: until(len(texts)))
    resumed = build(tmp_path / "t", "demo:text", n_training_tokens=n_training, tokenizer=second)
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.n_documents == whole.n_documents
    assert len(set(first.seen) & set(second.seen)) <= 1  # only the piece that the next one is joined to
    assert not (tmp_path / "t" / "partial").exists()


@pytest.mark.usefixtures("small_pieces")
def test_a_killed_tokenization_goes_on_from_its_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_SAVE_EVERY_S", 0)

    def texts() -> Iterator[str]:
        for number, document in enumerate(DOCUMENTS):
            if number == 60 and not (tmp_path / "killed").exists():  # what is on disk at this moment
                shutil.copytree(tmp_path / "whole" / "partial", tmp_path / "killed" / "partial")
            yield document

    monkeypatch.setattr(demo_text, "study_documents", texts)
    whole = build(tmp_path / "whole", "demo:text", n_training_tokens=16 * 200)
    with (tmp_path / "killed" / "partial" / "rows.bin").open("ab") as file:
        file.write(b"a row that was not whole")
    counting = counting_tokenizer()
    resumed = build(tmp_path / "killed", "demo:text", n_training_tokens=16 * 200, tokenizer=counting)
    assert resumed.fingerprint == whole.fingerprint
    assert not set(counting.seen) & set(DOCUMENTS[:30])


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_tokenization_of_other_text_or_packing_is_not_gone_on_with(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    write_jsonl(source, DOCUMENTS)
    with source.open("a") as file:
        file.write("{")
    for changes in ({"context_size": 8}, {}):
        with pytest.raises(StudyError, match=r"d.jsonl:240: cannot be read"):
            build(tmp_path / "t", source, n_training_tokens=16 * 900, **changes)
        assert (tmp_path / "t" / "partial" / "state.json").exists()
    write_jsonl(source, DOCUMENTS[::-1])
    assert build(tmp_path / "t", source).fingerprint == build(tmp_path / "other", source).fingerprint


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: no pre-tokenizer, and a space put before every text."""
    plain = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    plain.train_from_iterator([word for text in DOCUMENTS for word in re.split(r"(?= )", text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: digits, spaces and letters apart, offsets without the spaces."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(DOCUMENTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece_like_tokenizer, trimming_tokenizer])
def test_a_long_document_cut_into_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, make: Callable[[], PreTrainedTokenizerFast]
) -> None:
    some = make()
    generator = np.random.default_rng(0)
    words = [*WORDS, "\n", "\n\n", "   ", "1234", "übrig", "🙂", "<s>", "日本語", "antidisestablishmentarianism"]
    text = " ".join(generator.choice(words, 8000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    ids = some.encode(text, add_special_tokens=False)
    n_rows = len(ids) // 16
    built = build(
        tmp_path / "t",
        tmp_path / "long.txt",
        tokenizer=some,
        prepend_bos=False,
        separator="none",
        n_training_tokens=(n_rows - 10) * 16,
    )
    np.testing.assert_array_equal(in_order(built).ravel(), ids[: n_rows * 16])


@pytest.mark.usefixtures("small_pieces")
def test_text_on_which_no_pieces_agree_is_cut_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "spaces.txt").write_text("the" + " " * 20_000 + "end")
    one = make_tokenizer()
    one.add_tokens([" " * 7])
    built = build(
        tmp_path / "t", tmp_path / "spaces.txt", tokenizer=one, n_evaluation_tokens=160, n_training_tokens=160
    )
    assert built.n_documents == 1


def write_ids(path: Path, ids: object) -> Path:
    np.save(path, np.asarray(ids))
    return path


def test_given_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (60, 24), np.int64)
    built = build(tmp_path / "t", write_ids(tmp_path / "ids.npy", ids), n_evaluation_tokens=250, n_training_tokens=700)
    np.testing.assert_array_equal(built.evaluation, ids[:10])
    np.testing.assert_array_equal(built.training, ids[10:40])
    assert (built.context_size, built.bos_token_id, built.n_documents) == (24, BOS, None)
    wide = build(tmp_path / "w", write_ids(tmp_path / "wide.npy", ids + 100), vocab_size=70_000)
    np.testing.assert_array_equal(wide.evaluation, ids[:6] + 100)
    assert wide.training.dtype == np.uint32


def test_given_ids_need_no_bos(tmp_path: Path) -> None:
    source = write_ids(tmp_path / "ids.npy", np.ones((60, 16), np.uint8))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    assert build(tmp_path / "t", source, tokenizer=bare).bos_token_id is None


BAD_IDS = {
    "floats": (np.ones((60, 16)), r"expected integers \[seq pos\], found float64"),
    "one axis": (np.ones(960, int), r"found int64 of shape \[960\]"),
    "too large": (np.full((60, 16), 300), r"id 300 in row 0 is not below the vocabulary's 300"),
    "negative": (np.full((60, 16), -1), "id -1 in row 0"),
    "too few": (np.ones((49, 16), int), "holds 784 tokens, which is 49 sequences of 16"),
    "none": (np.ones((0, 16), int), "is empty|no whole array"),
    "objects": (np.array([[{}]]), "no whole array of token ids"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_given_ids_that_cannot_be_used_are_refused(tmp_path: Path, name: str) -> None:
    ids, message = BAD_IDS[name]
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    with pytest.raises(StudyError, match=message):
        build(tmp_path / "t", tmp_path / "ids.npy")
    assert not (tmp_path / "t").exists()


def cut_off(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_TEXT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda at: at / "none.jsonl", "there is no file or directory"),
    "no demo": (lambda _: "demo:texts", "there is no demo:texts\n  try: demo:text"),
    "other format": (lambda at: written(at / "d.csv", "text\na"), r"d.csv is none of .txt, .json, .jsonl, .parquet"),
    "empty directory": (lambda at: at, r"holds no file of .txt"),
    "empty text": (lambda at: written(at / "d.txt", ""), "d.txt is empty"),
    "empty list": (lambda at: write_json(at / "d.json", []), "d.json is empty"),
    "empty documents": (lambda at: write_parquet(at / "d.parquet", ["", ""]), "d.parquet is empty"),
    "not UTF-8": (lambda at: written(at / "d.txt", b"the cat \xff"), "d.txt: cannot be read: UnicodeDecodeError"),
    "bad JSON": (lambda at: written(at / "d.json", '[\n{"text": }]'), r"d.json: cannot be read: .*line 2 column 10"),
    "JSON lines in .json": (lambda at: written(at / "d.json", "{}\n{}"), "rename it to .jsonl"),
    "no list": (lambda at: written(at / "d.json", "{}"), "d.json: expected a list of rows, found dict"),
    "bad line": (lambda at: written(at / "d.jsonl", '{"text": "a"}\n{"te'), r"d.jsonl:2: cannot be read"),
    "no column": (lambda at: written(at / "d.jsonl", '{"a": "", "b": ""}'), "d.jsonl:1: no column 'text', only a, b"),
    "no parquet column": (
        lambda at: write_parquet(at / "d.parquet", ["a"]).rename(at / "e.parquet"),
        "e.parquet: no column 'body', only id, text",
    ),
    "number": (lambda at: written(at / "d.jsonl", '{"text": 3}'), "d.jsonl:1: expected text .* found int '3'"),
    "null": (lambda at: written(at / "d.json", '[{"text": "a"}, null]'), "d.json, row 2: .* found null"),
    "truncated parquet": (lambda at: cut_off(write_parquet(at / "d.parquet", DOCUMENTS)), "d.parquet: cannot be read"),
    "truncated array": (
        lambda at: cut_off(write_ids(at / "d.npy", np.ones((60, 16), int))),
        "d.npy: is no whole array of token ids",
    ),
    "no split": (lambda at: write_saved_splits(at / "d", ["a"]), "d: no split 'body', only test, train"),
    "truncated dataset": (lambda at: truncated_dataset(at / "d"), "d: cannot be read"),
    "too few": (
        lambda at: write_json(at / "d.json", ["<s>" * 170]),
        re.escape(
            "d.json holds 170 tokens, which is 10 sequences of 16; asked for are 10 (160 tokens) for evaluation and"
            " 40 (640 tokens) for training\n  try: lower evaluate.tokens, train.tokens"
        ),
    ),
}


def truncated_dataset(path: Path) -> Path:
    write_saved(path, DOCUMENTS)
    cut_off(next(path.glob("*.arrow")))
    return path


@pytest.mark.parametrize("name", BAD_TEXT)
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    make, message = BAD_TEXT[name]
    other = {"no parquet column": {"column": "body"}, "no split": {"split": "body"}}.get(name, {})
    with pytest.raises(StudyError, match=message):
        build(tmp_path / "t", make(tmp_path), **other)
    assert not list((tmp_path / "t").glob("*.*"))


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    documents = ['{"text": "half \\ud800 of it"}', *(json.dumps({"text": text}) for text in DOCUMENTS)]
    built = build(tmp_path / "t", written(tmp_path / "d.jsonl", "\n".join(documents)))
    assert "half ? of it" in str(tokenizer().decode(in_order(built)[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_evaluation_tokens": 15}, "evaluate.tokens: 15 tokens are less than one sequence of 16"),
        ({"context_size": 1}, "a sequence of 1 tokens has no next token"),
        ({"bos_token": "<bos>"}, r"tokens.bos_token: '<bos>' is \d tokens"),
    ],
)
def test_arguments_that_make_no_token_set_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS), **changes)
    assert not (tmp_path / "t").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a file")
    with pytest.raises(StudyError, match="cannot be written"):
        build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS))


def test_a_token_set_is_loaded_as_it_was_built(tmp_path: Path) -> None:
    built = build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS))
    shutil.move(tmp_path / "t", tmp_path / "moved")
    loaded = load_token_set(tmp_path / "moved")
    np.testing.assert_array_equal(loaded.evaluation, built.evaluation)
    assert isinstance(loaded.training, np.memmap)
    assert (loaded.fingerprint, loaded.bos_token_id) == (built.fingerprint, BOS)


@pytest.mark.parametrize("name", ["evaluation.npy", "training.npy", "tokens.json"])
def test_a_damaged_token_set_is_recognised(tmp_path: Path, name: str) -> None:
    build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS))
    file = tmp_path / "t" / name
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-20]), lambda: file.write_bytes(b""), file.unlink):
        damage()
        with pytest.raises(StudyError, match=r"damaged|no whole token set") as caught:
            load_token_set(tmp_path / "t")
        assert f"delete {tmp_path / 't'} and run again" in str(caught.value)


def test_a_token_set_whose_arrays_were_swapped_is_recognised(tmp_path: Path) -> None:
    build(tmp_path / "t", write_json(tmp_path / "d.json", DOCUMENTS))
    shutil.copy(tmp_path / "t" / "training.npy", tmp_path / "t" / "evaluation.npy")
    with pytest.raises(StudyError, match=r"evaluation.npy is \(40, 16\) <u2 instead of"):
        load_token_set(tmp_path / "t")


def test_bos_is_the_token_named_else_bos_else_eos() -> None:
    backend = tokenizer().backend_tokenizer
    assert bos_token_id(tokenizer(), None) == BOS
    assert bos_token_id(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), None) == EOS
    assert bos_token_id(tokenizer(), "<|end|>") == 5
    assert bos_token_id(tokenizer(), "\n") == ids_of("\n")[0]
    with pytest.raises(StudyError, match="neither a bos nor an eos"):
        bos_token_id(PreTrainedTokenizerFast(tokenizer_object=backend), None)
    with pytest.raises(StudyError, match=r"'<\|ende\|>' is \d+ tokens and not one\n  try: .*<\|end\|>"):
        bos_token_id(tokenizer(), "<|ende|>")
    with pytest.raises(StudyError, match="'' is unknown to the tokenizer"):
        bos_token_id(tokenizer(), "")


def test_rows_without_bos_and_separators_need_no_bos(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    source = write_json(tmp_path / "d.json", DOCUMENTS)
    built = build(tmp_path / "a", source, tokenizer=bare, prepend_bos=False, separator="none")
    assert built.bos_token_id is None
    assert in_order(built).ravel()[:40].tolist() == [i for text in DOCUMENTS[:8] for i in ids_of(text)][:40]
    with pytest.raises(StudyError, match="neither a bos nor an eos"):
        build(tmp_path / "b", source, tokenizer=bare)
    with pytest.raises(StudyError, match="the tokenizer has no eos token"):
        build(tmp_path / "c", source, tokenizer=bare, prepend_bos=False, separator="eos")
