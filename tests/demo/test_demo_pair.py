"""The embedded pair and its text: what the demo promises to anyone who installs the package."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from sae_transfer import demo
from sae_transfer.demo import make_pair, pair_tokens, text

SHARED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.model_dir("base"))


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(demo.model_dir("base"))
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def chat() -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(demo.model_dir("chat"))
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def measured(
    base: LlamaForCausalLM, chat: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """What `pair.json` holds of each side, measured now on the text of this Python."""
    return {"base": make_pair.measure(base, tokenizer), "chat": make_pair.measure(chat, tokenizer)}


def test_both_models_take_at_most_10_megabytes() -> None:
    files = [path for side in demo.SIDES for path in demo.model_dir(side).iterdir()]
    assert 0 < sum(path.stat().st_size for path in files) <= 10_000_000


def test_both_sides_have_the_same_tokenizer_files() -> None:
    for name in SHARED_FILES:
        assert (demo.model_dir("base") / name).read_bytes() == (demo.model_dir("chat") / name).read_bytes()


def test_saved_configurations_hold_no_path() -> None:
    for side in demo.SIDES:
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            values = json.loads((demo.model_dir(side) / name).read_text()).values()
            assert not [value for value in values if isinstance(value, str) and "/" in value]


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="base and chat, not 'instruct'"):
        demo.model_dir("instruct")


def test_chat_template_is_the_format_that_the_chat_model_was_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    turn = [{"role": "user", "content": "What is re?"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|user|>What is re?<|end|><|assistant|>"
    turns = [*turn, {"role": "assistant", "content": "A module."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{prompt}A module.<|end|>"


def test_special_tokens_have_the_ids_that_the_configurations_name(
    tokenizer: PreTrainedTokenizerBase, base: LlamaForCausalLM, chat: LlamaForCausalLM
) -> None:
    assert tokenizer.convert_tokens_to_ids(list(pair_tokens.SPECIAL_TOKENS)) == list(range(6))
    assert base.generation_config.eos_token_id == tokenizer.eos_token_id == pair_tokens.EOS
    assert chat.generation_config.eos_token_id == pair_tokens.END
    assert len(tokenizer) == base.config.vocab_size == chat.config.vocab_size == pair_tokens.VOCAB_SIZE


def test_at_least_90_of_100_chat_answers_end_within_64_tokens(measured: dict[str, dict[str, float]]) -> None:
    assert len(make_pair.measured_questions()) == 100
    assert measured["chat"]["ended_share"] >= 0.9


def test_fine_tuning_lowered_the_loss_on_held_out_answers(measured: dict[str, dict[str, float]]) -> None:
    assert measured["chat"]["answer_loss"] < measured["base"]["answer_loss"] - 1


@pytest.mark.parametrize("side", demo.SIDES)
def test_first_bos_is_far_from_every_other_token_at_the_site(side: str, measured: dict[str, dict[str, float]]) -> None:
    assert measured[side]["scaled_norm_bos_first"] > 2 * 128**0.5
    assert measured[side]["scaled_norm_bos_first"] > 1.5 * measured[side]["scaled_norm_largest_other"]


def test_base_model_predicts_held_out_text(measured: dict[str, dict[str, float]]) -> None:
    # Measured: 3.05 nats on Python 3.11.7 (`pair.json`). Another Python's text differs a little; ln 2048 is 7.62.
    assert measured["base"]["text_loss"] < 3.3


def test_pair_json_says_what_the_models_give(measured: dict[str, dict[str, float]]) -> None:
    report = json.loads((demo.PACKAGE_DIR / "pair.json").read_text())
    if report["python"] != platform.python_version():
        pytest.skip(f"pair.json was measured on the text of Python {report['python']}")
    for side in demo.SIDES:
        # Another processor's float32 may turn a greedy answer: the tolerance is two of the 100 questions.
        assert measured[side] == pytest.approx(report["held_out"][side], rel=0.02, abs=0.02)


def test_no_held_out_document_is_a_pretraining_document() -> None:
    held_out, training = text.study_documents(), text.pretraining_documents()
    assert len(held_out) > 500
    assert set(held_out).isdisjoint(training)
    assert max(map(len, held_out + training)) <= text.MAX_DOCUMENT_CHARS


def test_no_held_out_question_is_a_training_question() -> None:
    training = {pair.question for pair in text.question_pairs(held_out=False)}
    assert training.isdisjoint(row["instruction"] for row in text.study_instructions())


def test_instructions_are_alpaca_rows_without_repetition() -> None:
    rows = text.study_instructions()
    assert len(rows) >= 150
    assert len({row["instruction"] for row in rows}) == len(rows)
    assert all(
        row.keys() == {"instruction", "input", "output"} and row["input"] == "" and row["output"] for row in rows
    )


def test_study_text_is_enough_for_the_demo(tokenizer: PreTrainedTokenizerBase) -> None:
    assert pair_tokens.pack(text.study_documents(), tokenizer).numel() >= 480_000


def test_study_documents_do_not_depend_on_the_order_of_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, modules, walk = text.study_documents(), list(text._modules()), os.walk

    def backwards(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for path, below, files in walk(root):
            below.reverse()
            yield path, below, files[::-1]

    monkeypatch.setattr(text.os, "walk", backwards)
    assert list(text._modules()) == modules
    assert text.study_documents() == documents


def test_a_missing_module_takes_only_its_own_documents_away(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, modules = text.study_documents(), list(text._modules())
    gone = next(module for module, _ in modules if text.is_held_out(module))
    monkeypatch.setattr(text, "_modules", lambda: (item for item in modules if item[0] != gone))
    left = text.study_documents()
    assert 0 < len(left) < len(documents)
    assert left == [document for document in documents if document in set(left)]


def test_the_split_never_moves() -> None:
    names = ("argparse", "asyncio.events", "datetime", "inspect", "json.decoder", "re", "tarfile", "textwrap", "typing")
    assert [name for name in names if text.is_held_out(name)] == ["datetime", "inspect", "re"]
    assert text.is_held_out("_pydatetime") == text.is_held_out("datetime")


def test_text_needs_no_torch() -> None:
    program = "import sys, sae_transfer.demo.text; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_training_twice_makes_the_same_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_pair, "MAX_CHAT_STEPS", 2)
    monkeypatch.setattr(make_pair, "N_MEASURED_QUESTIONS", 2)
    monkeypatch.setattr(make_pair, "N_MEASURED_ROWS", 8)
    documents = text.pretraining_documents()[:40]
    monkeypatch.setattr(text, "pretraining_documents", lambda: documents)
    monkeypatch.setattr(text, "study_documents", lambda: documents)
    for name in ("first", "second"):
        make_pair.make_pair(tmp_path / name, base_tokens=2048)
    for side in demo.SIDES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / side)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "second" / side)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
