import json
import logging
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_transfer.errors import StudyError
from sae_transfer.models.chat import (
    Rollout,
    RolloutCounts,
    SectionName,
    context_length_of,
    end_of_turn_ids,
    generate_rollouts,
    given_rollouts,
    keep_answered,
    make_prompts,
    pack,
    read_rollouts,
    section_mask,
    section_positions,
    write_rollouts,
)
from tests.checkpoints import CHAT_TEMPLATE, make_checkpoint, make_tokenizer, words_of

MARKED = "<|user|>{instruction}<|end|><|assistant|>"
MISTRAL = " [INST] {instruction} [/INST] "
QWEN = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
INSTRUCTIONS = [words_of(seed, 1 + 3 * seed) for seed in range(8)]
SECTIONS: tuple[SectionName, ...] = ("rollout", "user_prompt", "control")
TRAINING_TEXT = [f"{words_of(seed, 300)}\n [INST] the [/INST] user assistant" for seed in range(4)]

byte_level = cache(make_tokenizer)


@cache
def qwen_like() -> PreTrainedTokenizerFast:
    """Byte-level, no BOS, offsets without the space that leads a token, words and newlines apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", extra_special_tokens=specials)
    fast.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast


@cache
def mistral_like(*, prepends: bool = False) -> PreTrainedTokenizerFast:
    """Spaces are part of the next word; bytes stand for what is unknown; `prepends` writes one before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if prepends:  # as Llama's conversion from sentencepiece does
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] | trim +"
        " ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}"
        "{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
    )
    return fast


def given(tokenizer: Any, template: str | None, instruction: str, completion: str) -> Rollout:
    prompts = make_prompts(tokenizer, [instruction], template)
    return given_rollouts(tokenizer, prompts, [completion], context_length=None)[0]


def parts_of(rollout: Rollout, tokenizer: Any) -> list[list[str]]:
    """Token strings of the opening, the instruction, the closing and the answer."""
    tokens = tokenizer.convert_ids_to_tokens(list(rollout.token_ids))
    bounds = [0, rollout.n_opening, rollout.closing_start, rollout.n_prompt, len(tokens)]
    return [tokens[a:b] for a, b in pairwise(bounds)]


def row_of(length: int, s: int, i: int, e: int, *, finished: bool | None = False, completion: str = "x") -> Rollout:
    return Rollout("do", "do", completion, tuple(range(length)), s, i, e, finished)


def positions(rollout: Rollout, section: SectionName) -> list[int]:
    return np.flatnonzero(section_positions(rollout, section)).tolist()


# Parts of a row


def test_a_row_is_masked_token_by_token() -> None:
    rollout = given(byte_level(), MARKED, " the cat sing", " a dog ran the")
    opening, user, closing, answer = parts_of(rollout, byte_level())
    assert opening == ["<s>", "<|user|>"]  # 0 1
    assert user == ["Ġthe", "Ġcat", "Ġsing"]  # 2 3 4
    assert closing == ["<|end|>", "<|assistant|>"]  # 5 6
    assert answer == ["Ġa", "Ġdog", "Ġran", "Ġthe"]  # 7 8 9 10
    assert positions(rollout, "rollout") == [6, 7, 8]
    assert positions(rollout, "user_prompt") == [2, 3, 4]
    assert positions(rollout, "control") == [0, 1, 5]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(12, 2, 5, 3), ([7, 8, 9], [2, 3, 4], [0, 1, 5, 6])),
        (row_of(9, 2, 5, 3), ([], [2, 3, 4], [0, 1, 5, 6])),  # one answer token: T-3 is before i+e-1
        (row_of(10, 2, 5, 3), ([7], [2, 3, 4], [0, 1, 5, 6])),
        (row_of(7, 0, 4, 0), ([3, 4], [0, 1, 2, 3], [])),  # no template at all
        (row_of(5, 0, 4, 0), ([], [0, 1, 2], [])),  # the instruction, too, stops at T-3
        (row_of(5, 1, 3, 1), ([], [1, 2], [0])),
    ],
)
def test_sections_follow_their_formula(row: Rollout, expected: tuple[list[int], ...]) -> None:
    assert tuple(positions(row, section) for section in SECTIONS) == expected


def test_mistrals_template_leaves_its_last_space_to_the_answer() -> None:
    tokenizer = mistral_like()
    opening, user, closing, answer = parts_of(given(tokenizer, MISTRAL, "the cat", "sat on"), tokenizer)
    assert opening[0] == "<s>" and "".join(opening[1:]) == "▁[INST]"
    assert user == ["▁the", "▁cat"]
    assert "".join(closing) == "▁[/INST]"
    assert answer == ["▁sat", "▁on"]


def test_a_space_that_the_tokenizer_writes_before_the_text_goes_with_the_next_token() -> None:
    tokenizer = mistral_like(prepends=True)
    opening, user, closing, answer = parts_of(given(tokenizer, MISTRAL, "the cat", "sat on"), tokenizer)
    assert ["".join(part) for part in (opening, user, closing, answer)] == [
        "<s>▁▁[INST]",
        "▁the▁cat",
        "▁[/INST]",
        "▁sat▁on",
    ]


def test_qwens_template_has_no_bos_and_its_newlines_are_its_own() -> None:
    tokenizer = qwen_like()
    opening, user, closing, answer = parts_of(given(tokenizer, QWEN, "the cat", "\nsat on"), tokenizer)
    assert opening[0] == "<|im_start|>" and "".join(opening[1:]) == "userĊ"
    assert "".join(user) == "theĠcat"
    assert closing[0] == "<|im_end|>" and "".join(closing) == "<|im_end|>Ċ<|im_start|>assistantĊ"
    assert "".join(answer) == "ĊsatĠon"


@pytest.mark.parametrize("tokenizer", [qwen_like(), byte_level()], ids=["trimmed offsets", "whole offsets"])
def test_spaces_at_an_instructions_ends_go_with_the_token_after_them(tokenizer: Any) -> None:
    rollout = given(tokenizer, "<|user|>\n{instruction}\nAnswer:", "  the cat  ", " on ")
    opening, user, closing, answer = ("".join(part) for part in parts_of(rollout, tokenizer))
    assert opening.removeprefix("<s>") == "<|user|>Ċ"
    assert (user, closing, answer) == ("ĠĠtheĠcat", "ĠĠĊAnswer:", "ĠonĠ")


def test_a_character_of_several_tokens_is_one_place() -> None:
    rollout = given(byte_level(), MARKED, "é世", "世")
    assert [len(part) for part in parts_of(rollout, byte_level())] == [2, 5, 2, 3]


def test_a_token_over_two_parts_belongs_to_the_first() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    opening, user, _, _ = parts_of(given(tokenizer, "<|user|>\n{instruction}<|end|>", "\nthe", "x"), tokenizer)
    assert opening == ["<s>", "<|user|>", "\n\n"] and "".join(user) == "the"


@pytest.mark.parametrize("instruction", ["user", "Ask: the", "the", "Ask", "<|user|>"])
def test_an_instruction_may_occur_in_its_template(instruction: str) -> None:
    rollout = given(byte_level(), "the user Ask: {instruction}\nthe user Ask:\n", instruction, "the user")
    assert ["".join(part) for part in parts_of(rollout, byte_level())] == [
        "<s>theĠuserĠAsk:",
        "Ġ" + instruction.replace(" ", "Ġ"),
        "ĊtheĠuserĠAsk:Ċ",
        "theĠuser",
    ]


# Templates


def test_a_template_that_begins_with_bos_gets_no_second_one() -> None:
    once = given(byte_level(), f"<s>{MARKED}", " the cat", " sat")
    assert once.token_ids == given(byte_level(), MARKED, " the cat", " sat").token_ids
    assert once.token_ids.count(0) == 1 and once.n_opening == 2


def test_the_tokenizers_own_template_is_used_with_the_generation_prompt() -> None:
    rollout = given(byte_level(), None, " the cat", " ran")
    assert rollout.prompt == "<s><|user|> the cat<|end|><|assistant|>"
    assert parts_of(rollout, byte_level()) == [
        ["<s>", "<|user|>"],
        ["Ġthe", "Ġcat"],
        ["<|end|>", "<|assistant|>"],
        ["Ġran"],
    ]


def test_a_system_turn_that_the_template_writes_belongs_to_the_opening() -> None:
    opening, user, _, _ = parts_of(given(qwen_like(), None, "Be good.", "No."), qwen_like())
    assert "".join(opening) == "<|im_start|>systemĊBeĠgood.<|im_end|>Ċ<|im_start|>userĊ"
    assert "".join(user) == "BeĠgood."


def test_an_instruction_whose_ends_the_template_trims_is_found() -> None:
    rollout = given(mistral_like(), None, "  the cat\n", " sat")
    assert rollout.instruction == "  the cat\n" and rollout.prompt == "<s> [INST] the cat [/INST]"
    assert ["".join(part) for part in parts_of(rollout, mistral_like())] == [
        "<s>▁[INST]",
        "▁the▁cat",
        "▁[/INST]",
        "▁sat",
    ]


def test_without_any_template_there_is_a_remedy() -> None:
    with pytest.raises(StudyError, match=r"no chat template\n  try: set instruct\.template"):
        make_prompts(make_tokenizer(chat_template=None), ["the cat"], None)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message is needed') }}", "{% if %}", "no place for it", "{{ m }}"]
)
def test_a_chat_template_that_cannot_be_used_is_refused(template: str) -> None:
    with pytest.raises(StudyError, match=r"chat template.*\n  try: set instruct\.template"):
        make_prompts(make_tokenizer(chat_template=template), ["the cat"], None)


def test_a_row_whose_template_cannot_be_found_is_named() -> None:
    changing = CHAT_TEMPLATE.replace("m['content']", "m['content'] | replace('dog', 'cat')")
    with pytest.raises(StudyError, match=r"row 2 \('the dog'\): its template cannot be found"):
        make_prompts(make_tokenizer(chat_template=changing), ["the cat", "the dog"], None)


@pytest.mark.parametrize(
    ("template", "part"), [("the c{instruction}\n", "instruction"), ("<|user|>{instruction}t", "closing template")]
)
def test_a_part_that_no_token_begins_in_is_named(template: str, part: str) -> None:
    instruction = "at" if part == "instruction" else " ca"
    prompts = make_prompts(byte_level(), [instruction], template)
    with pytest.raises(StudyError, match=rf"row 1 \('{instruction}'\): its {part} cannot be found"):
        given_rollouts(byte_level(), prompts, [" sat"], context_length=None)


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(byte_level(), ["the cat"], MARKED)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(StudyError, match="not a fast one"):
        given_rollouts(byte_level(), prompts, [" sat"], context_length=None)


# Answers that were given


def test_a_given_answer_is_tokenized_with_its_prompt_as_one_string() -> None:
    tokenizer = mistral_like()
    rollout = given(tokenizer, MISTRAL, "the cat", "sat on the mat</s>")
    ids = tokenizer.encode(" [INST] the cat [/INST] sat on the mat</s>", add_special_tokens=False)
    assert rollout.token_ids == (tokenizer.bos_token_id, *ids)
    assert rollout.completion == "sat on the mat</s>" and rollout.finished is None


def test_empty_answers_are_dropped_and_counted() -> None:
    completions = [" sat", "", "\n", "  "]
    prompts = make_prompts(byte_level(), [" the cat"] * 4, MARKED + " ")
    rollouts = given_rollouts(byte_level(), prompts, completions, context_length=None)
    kept, counts = keep_answered(rollouts, n_drawn=9, n_with_input=5)
    assert [rollout.completion for rollout in kept] == [" sat", "\n"]
    assert counts == RolloutCounts(n_drawn=9, n_with_input=5, n_empty=2, n_unfinished=None)


def test_nothing_but_empty_answers_is_refused() -> None:
    rows = [row_of(5, 1, 3, 2, completion="", finished=True)] * 3
    with pytest.raises(StudyError, match="all 3 answers are empty"):
        keep_answered(rows, n_drawn=3, n_with_input=0)


def test_unfinished_answers_are_kept_and_counted() -> None:
    rows = [row_of(9, 1, 3, 2, finished=finished) for finished in (True, False, False)]
    assert keep_answered(rows, n_drawn=3, n_with_input=0).counts == RolloutCounts(3, 0, 0, 2)


def test_a_given_row_longer_than_the_context_is_named() -> None:
    prompts = make_prompts(byte_level(), [" the", " the cat"], MARKED)
    assert given_rollouts(byte_level(), prompts, [" ran", " ran"], context_length=7)
    with pytest.raises(StudyError, match=r"row 2 \(' the cat'\): 8 tokens do not fit the model's context of 7"):
        given_rollouts(byte_level(), prompts, [" ran", " ran the"], context_length=7)


# Answers of the model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory, "llama")


def load(tmp_path_factory: pytest.TempPathFactory, architecture: str) -> Any:
    directory = make_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def answer(model: Any, instructions: Sequence[str] = INSTRUCTIONS, **changes: Any) -> list[Rollout]:
    prompts = make_prompts(byte_level(), instructions, None)
    options: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 8, "end_ids": frozenset({1, 5})}
    return generate_rollouts(model, byte_level(), prompts, **{**options, **changes})


@torch.inference_mode()
def greedy_by_hand(model: Any, ids: list[int], n: int) -> list[int]:
    """Most likely tokens, each from a pass over all before it, without padding or cache."""
    for _ in range(n):
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma", "gemma2", "gpt2"])
def test_a_batch_of_any_size_gives_the_tokens_of_batch_size_one(
    architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = load(tmp_path_factory, architecture)
    alone = answer(model, batch_size=1)
    assert answer(model, batch_size=3) == alone
    assert answer(model, batch_size=8) == alone
    for rollout in alone:
        n_new = len(rollout.token_ids) - rollout.n_prompt
        assert list(rollout.token_ids) == greedy_by_hand(model, list(rollout.token_ids[: rollout.n_prompt]), n_new)


def test_an_answer_is_cut_at_its_end_of_turn_token(llama: Any) -> None:
    whole = answer(llama, end_ids=frozenset())
    assert all(len(row.token_ids) - row.n_prompt == 12 and row.finished is False for row in whole)
    ends = frozenset({whole[0].token_ids[whole[0].n_prompt + 4], whole[1].token_ids[whole[1].n_prompt]})
    cut = answer(llama, end_ids=ends)
    for long, short in zip(whole, cut, strict=True):
        ids = long.token_ids[long.n_prompt :]
        n = next((at for at, id_ in enumerate(ids) if id_ in ends), None)
        assert short.token_ids == long.token_ids[: long.n_prompt] + ids[:n]
        assert short.finished is (n is not None)
        assert short.completion == byte_level().decode(list(ids[:n]))
    assert cut[0].finished and cut[1].is_empty
    n_empty = sum(row.is_empty for row in cut)
    kept, counts = keep_answered(cut, n_drawn=8, n_with_input=0)
    assert len(kept) == 8 - n_empty and counts.n_empty == n_empty
    assert counts.n_unfinished == sum(row.finished is False for row in cut)


def test_the_checkpoints_generation_settings_change_and_warn_of_nothing(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = answer(llama)
    settings = llama.generation_config
    flags = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 9.0}
    before = {name: getattr(settings, name) for name in flags}
    try:
        for name, value in flags.items():
            setattr(settings, name, value)
        transformers_logger = logging.getLogger("transformers")
        transformers_logger.addHandler(caplog.handler)
        try:
            with warnings.catch_warnings(action="error"):
                assert answer(llama) == plain
        finally:
            transformers_logger.removeHandler(caplog.handler)
        assert not caplog.records
        assert llama.generation_config is settings and settings.repetition_penalty == 9.0
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def test_a_generated_row_keeps_its_parts_and_reports_progress(llama: Any) -> None:
    done = list[int]()
    rollouts = answer(llama, batch_size=3, progress=done.append)
    assert done == [3, 6, 8]
    for rollout, instruction in zip(rollouts, INSTRUCTIONS, strict=True):
        opening, user, closing, _ = parts_of(rollout, byte_level())
        assert opening == ["<s>", "<|user|>"] and closing == ["<|end|>", "<|assistant|>"]
        assert "".join(user) == instruction.replace(" ", "Ġ")


def test_the_space_that_ends_a_prompt_goes_with_the_generated_token_after_it(llama: Any) -> None:
    prompts = make_prompts(byte_level(), ["the cat"], MISTRAL)
    (rollout,) = generate_rollouts(llama, byte_level(), prompts, max_new_tokens=4, batch_size=1, end_ids=frozenset({1}))
    _, _, closing, answered = parts_of(rollout, byte_level())
    assert "".join(closing) == "Ġ[/INST]" and answered[0] == "Ġ" and len(answered) == 5


def test_a_row_that_could_outgrow_the_context_is_named(llama: Any) -> None:
    assert context_length_of(llama) == 128
    n = answer(llama, ["a"])[0].n_prompt
    assert answer(llama, ["a"], max_new_tokens=128 - n, end_ids=frozenset())
    with pytest.raises(StudyError, match=rf"row 1 \('a'\): {n} tokens and up to {129 - n} new ones.*context of 128"):
        answer(llama, ["a"], max_new_tokens=129 - n)


def test_an_answer_ends_where_configuration_or_chat_template_says(llama: Any) -> None:
    assert end_of_turn_ids(llama, byte_level()) == {1, 5}  # eos, and <|end|> of the template
    assert end_of_turn_ids(llama, make_tokenizer(chat_template=None)) == {1}
    assert end_of_turn_ids(llama, make_tokenizer(chat_template="{{ raise_exception('no') }}")) == {1}
    settings, own = llama.generation_config, llama.generation_config.eos_token_id
    try:
        settings.eos_token_id = [1, 7]
        assert end_of_turn_ids(llama, byte_level()) == {1, 5, 7}
    finally:
        settings.eos_token_id = own


# Arrays and files


def test_rows_are_padded_on_the_right_and_padding_counts_nowhere() -> None:
    rows = [row_of(12, 2, 5, 3), row_of(9, 1, 4, 1), row_of(10, 2, 5, 3)]
    ids, lengths = pack(rows, pad_id=99)
    assert ids.shape == (3, 12) and lengths.tolist() == [12, 9, 10]
    assert ids[1].tolist() == [*range(9), 99, 99, 99]
    for section in SECTIONS:
        mask, with_loss = section_mask(rows, section)
        assert mask.shape == with_loss.shape == ids.shape
        for row, rollout in enumerate(rows):
            assert np.flatnonzero(mask[row]).tolist() == positions(rollout, section)
            assert np.flatnonzero(with_loss[row]).tolist() == positions(rollout, section)


def test_rollouts_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        given(byte_level(), MARKED, "a \u2028 line\n世", "x\r\ny"),
        row_of(9, 1, 4, 1, finished=True),
        row_of(9, 1, 4, 1, finished=False),
    ]
    path = tmp_path / "instruct" / "rollouts.jsonl"
    write_rollouts(path, rows)
    assert read_rollouts(path) == rows
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["instruction"], line["completion"]) for line in lines] == [
        (row.instruction, row.completion) for row in rows
    ]


def test_rollouts_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [row_of(9, 1, 4, 1)] * 3)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for damaged in (
        whole[:-20],
        "".join(lines[:2]),
        "".join(lines[1:]),
        "",
        "[]\n",
        "{}\n",
        whole.replace("finished", "done"),
    ):
        path.write_text(damaged)
        with pytest.raises(StudyError, match=r"rollouts\.jsonl: the rollouts cannot be read(.|\n)*delete that file"):
            read_rollouts(path)
    with pytest.raises(StudyError, match="cannot be read"):
        read_rollouts(tmp_path / "absent.jsonl")
