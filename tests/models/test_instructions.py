import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets.exceptions import DatasetNotFoundError
from pyarrow import parquet

from sae_transfer.demo.text import study_instructions
from sae_transfer.errors import StudyError
from sae_transfer.models.instructions import Exchange, Instructions, read_exchanges, read_instructions

ALPACA = [{"instruction": f"Say {n}.", "input": "" if n % 2 else "aloud", "output": str(n)} for n in range(20)]
WITHOUT_INPUT = tuple(row["instruction"] for row in ALPACA if not row["input"])


def write_json(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows))
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = [write_json, write_jsonl, write_parquet]


def conversation(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize("write", WRITERS)
def test_alpaca_rows_with_an_input_are_dropped(write: Callable[..., Path], tmp_path: Path) -> None:
    read = read_instructions(str(write(tmp_path / "alpaca", ALPACA)), n=100, seed=42)
    assert read == Instructions(WITHOUT_INPUT, n_drawn=20, n_with_input=10)


@pytest.mark.parametrize("write", WRITERS)
def test_rows_are_drawn_first_and_dropped_then(write: Callable[..., Path], tmp_path: Path) -> None:
    read = read_instructions(str(write(tmp_path / "alpaca", ALPACA)), n=7, seed=42)
    drawn = [ALPACA[i] for i in np.random.default_rng(42).choice(20, 7, replace=False)]
    kept = tuple(row["instruction"] for row in drawn if not row["input"])
    assert read == Instructions(kept, n_drawn=7, n_with_input=7 - len(kept))


def test_another_seed_draws_other_rows(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "alpaca", ALPACA))
    assert read_instructions(path, n=7, seed=1) == read_instructions(path, n=7, seed=1)
    assert read_instructions(path, n=7, seed=1).texts != read_instructions(path, n=7, seed=2).texts


@pytest.mark.parametrize("write", WRITERS)
def test_the_first_user_message_of_a_conversation_is_the_instruction(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        conversation(("system", "Be brief."), ("user", "Sing."), ("assistant", "La."), ("user", "Again.")),
        conversation(("user", "Dance.")),
    ]
    assert read_instructions(str(write(tmp_path / "chats", rows)), n=9, seed=0).texts == ("Sing.", "Dance.")


def test_a_text_file_has_an_instruction_a_line(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes("\ufeffSing.\r\n\n  Dance \u2028 now. \nStop.".encode())
    assert read_instructions(str(path), n=9, seed=0).texts == ("Sing.", "  Dance \u2028 now. ", "Stop.")


def test_rows_may_be_texts_and_input_may_be_absent_or_null(tmp_path: Path) -> None:
    rows = ["Sing.", {"instruction": "Dance."}, {"instruction": "Stop.", "input": None}]
    assert read_instructions(str(write_json(tmp_path / "mixed", rows)), n=9, seed=0).texts == (
        "Sing.",
        "Dance.",
        "Stop.",
    )


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"instruction": "Sing \\ud83d now."}\n')
    assert read_instructions(str(path), n=9, seed=0).texts == ("Sing ? now.",)


def test_the_demo_has_instructions_of_its_own() -> None:
    read = read_instructions("demo:instructions", n=10, seed=0)
    assert len(read.texts) == read.n_drawn == 10 and read.n_with_input == 0
    assert set(read.texts) <= {row["instruction"] for row in study_instructions()}


def test_the_train_split_of_a_hub_dataset_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.Dataset:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ALPACA)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_instructions("someone/alpaca", n=100, seed=0).texts == WITHOUT_INPUT
    assert asked == [(("someone/alpaca",), {"split": "train"})]


def test_a_hub_dataset_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("Dataset 'someone/alpaca' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(StudyError, match=r"instruct\.dataset: someone/alpaca from the hub.*doesn't exist"):
        read_instructions("someone/alpaca", n=1, seed=0)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "is empty"),
        ([{"prompt": "Sing.", "answer": "La."}], r"row 1: neither instruction nor messages, only prompt, answer"),
        ([{"instruction": 3}], r"row 1: expected text, found int '3'"),
        ([{"instruction": " "}], r"row 1: expected text"),
        ([7], r"row 1: expected text, found int '7'"),
        ([{"messages": "Sing."}], r"row 1: expected messages to be a list of role and content"),
        ([conversation(("system", "Sing."))], r"row 1: no message of the role user, only system"),
        ([conversation(("user", ""))], r"row 1: expected text"),
        ([{"instruction": "Sing.", "input": "this"}], r"none of the 1 rows drawn from .* is without an input"),
    ],
)
def test_rows_that_give_no_instruction_are_refused(rows: list[Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=problem):
        read_instructions(str(write_json(tmp_path / "bad", rows)), n=9, seed=0)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"instruction": "Sing')
    (tmp_path / "cut.jsonl").write_text('"Sing."\n{"instruction": "Sing')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "object.json").write_text('{"data": []}')
    (tmp_path / "sheet.csv").write_text("instruction\nSing.")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, problem in {
        "absent.json": r"instruct\.dataset: there is no file or directory",
        "cut.json": r"cut\.json: cannot be read",
        "cut.jsonl": r"cut\.jsonl:2: cannot be read",
        "cut.parquet": r"cut\.parquet: cannot be read",
        "object.json": r"expected a list of rows, found dict",
        "sheet.csv": r"is no file of \.txt, \.json, \.jsonl, \.parquet",
        ".": r"is no file of",
        "empty.txt": r"is empty",
    }.items():
        with pytest.raises(StudyError, match=problem):
            read_instructions(str(tmp_path / name), n=9, seed=0)
    with pytest.raises(StudyError, match="there is no demo:chat"):
        read_instructions("demo:chat", n=9, seed=0)


def test_given_answers_are_read_in_order(tmp_path: Path) -> None:
    rows = [{"instruction": "Sing.", "completion": " La. "}, {"instruction": "Stop.", "completion": "", "more": 1}]
    assert read_exchanges(write_jsonl(tmp_path / "given", rows)) == [Exchange("Sing.", " La. "), Exchange("Stop.", "")]


def test_given_answers_without_their_fields_are_refused(tmp_path: Path) -> None:
    for rows, problem in (
        ([{"instruction": "Sing.", "output": "La."}], r":1: expected the fields .*, found only instruction, output"),
        (["Sing."], r":1: expected the fields .*, found str 'Sing\.'"),
        ([{"instruction": "Sing.", "completion": None}], r":1, completion: expected text, found null"),
        ([{"instruction": "", "completion": "La."}], r":1, instruction: expected text"),
        ([], "is empty"),
    ):
        with pytest.raises(StudyError, match=problem):
            read_exchanges(write_jsonl(tmp_path / "given", rows))
    with pytest.raises(StudyError, match=r"instruct\.rollouts: there is no file"):
        read_exchanges(tmp_path / "absent.jsonl")
    with pytest.raises(StudyError, match=r"is no \.jsonl"):
        read_exchanges(tmp_path)
