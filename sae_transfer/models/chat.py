"""Chat templates, greedy rollouts, and which of their positions a section takes.

Axes: seq pos. A row is an opening template, the instruction, a closing template and the answer; T is its number of real
tokens, s those of the opening, i the first of the closing, e their number.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.study import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SectionName = Literal["rollout", "user_prompt", "control"]

_OPENING, _USER, _CLOSING, _ANSWER = range(4)
_STAND_IN = "\ue000instruction\ue000"  # characters for private use: no template writes them, none changes them


@dataclass(frozen=True)
class Prompt:
    """An instruction in its template.

    Attributes:
        row: Its number among the instructions, from 1.
        instruction: As it was given.
        opening: Template before it.
        user: The instruction as it stands in the template, which may have taken spaces off its ends.
        closing: Template after it.
        bos_token_id: BOS to be put before the text; None where the text holds it or there is none.
    """

    row: int
    instruction: str
    opening: str
    user: str
    closing: str
    bos_token_id: int | None

    @property
    def text(self) -> str:
        """All of it, as it is tokenized."""
        return self.opening + self.user + self.closing

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return f"row {self.row} ({_shortened(self.instruction)!r})"


@dataclass(frozen=True)
class Rollout:
    """A prompt and the answer to it, as tokens.

    Attributes:
        instruction: As it was given.
        prompt: Text of the prompt, without a BOS that was put before it.
        completion: Text of the answer.
        token_ids: All real tokens of the row, no padding and no end-of-turn token that was generated.
        n_opening: s, the tokens of the opening template, BOS included.
        closing_start: i, the index of the first token of the closing template.
        n_closing: e, the number of its tokens.
        finished: Whether the answer came to its end-of-turn token; None for an answer that was given.
    """

    instruction: str
    prompt: str
    completion: str
    token_ids: tuple[int, ...]
    n_opening: int
    closing_start: int
    n_closing: int
    finished: bool | None

    @property
    def n_prompt(self) -> int:
        """Tokens before the answer."""
        return self.closing_start + self.n_closing

    @property
    def is_empty(self) -> bool:
        """Whether there is no answer, or nothing but spaces."""
        return not self.completion.strip(" ")


@dataclass(frozen=True)
class RolloutCounts:
    """What became of the rows of an instruction dataset.

    Attributes:
        n_drawn: Rows drawn from it.
        n_with_input: Of these, dropped because they have an input.
        n_empty: Of the rest, dropped because the answer is empty.
        n_unfinished: Answers kept that ran to the longest length; None where answers were given.
    """

    n_drawn: int
    n_with_input: int
    n_empty: int
    n_unfinished: int | None


class Answered(NamedTuple):
    """Rows that have an answer."""

    rollouts: list[Rollout]
    counts: RolloutCounts


class PackedRollouts(NamedTuple):
    """Rows padded on the right."""

    ids: NDArray[np.int64]
    """`[seq pos]`"""
    lengths: NDArray[np.int64]
    """Real tokens, `[seq]`."""


class SectionMask(NamedTuple):
    """Positions of a section, and those of them that have a next token, `[seq pos]`."""

    positions: NDArray[np.bool_]
    with_loss: NDArray[np.bool_]


def make_prompts(
    tokenizer: "PreTrainedTokenizerBase", instructions: Sequence[str], template: str | None
) -> list[Prompt]:
    """Put instructions into their template.

    A template that is given gets the tokenizer's BOS before it, unless it begins with that or the tokenizer has none
    (Qwen): what TransformerLens did for the post. The tokenizer's own chat template writes its BOS itself. No system
    message is added; one that the chat template writes by itself belongs to the opening.

    Args:
        tokenizer: The chat model's.
        instructions: As `read_instructions` gives them.
        template: Text with `{instruction}` in it, or None for the tokenizer's chat template with the generation prompt.

    Returns:
        Prompts, in the order of the instructions.

    Raises:
        StudyError: There is no template, or it cannot be found around an instruction.
    """
    if template is not None:
        opening, _, closing = template.partition("{instruction}")
        bos_id = tokenizer.bos_token_id
        if not isinstance(bos_id, int) or template.startswith(str(tokenizer.bos_token)):
            bos_id = None
        return [Prompt(row, text, opening, text, closing, bos_id) for row, text in enumerate(instructions, start=1)]
    opening, found, closing = _rendered(tokenizer, _STAND_IN).partition(_STAND_IN)
    if not found or _STAND_IN in closing:
        raise StudyError("pair.chat: its chat template does not write the instruction once", "set instruct.template")
    prompts = []
    for row, instruction in enumerate(instructions, start=1):
        text = _rendered(tokenizer, instruction)
        for user in (instruction, instruction.strip()):
            if text == opening + user + closing:
                prompts.append(Prompt(row, instruction, opening, user, closing, None))
                break
        else:
            raise StudyError(
                f"instruct: row {row} ({_shortened(instruction)!r}): its template cannot be found in {text[:200]!r}",
                "set instruct.template, or leave that row out",
            )
    return prompts


def end_of_turn_ids(model: Any, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that end an answer.

    Those of the model's generation configuration, its configuration and its tokenizer, and the special token that the
    chat template writes after an answer: Gemma's configuration does not name that one.

    Args:
        model: The chat model.
        tokenizer: Its tokenizer.
    """
    ids = set[int]()
    for owner in (model.generation_config, model.config.get_text_config(), tokenizer):
        named = getattr(owner, "eos_token_id", None)
        ids.update(named if isinstance(named, list) else [named] if isinstance(named, int) else [])
    with suppress(StudyError):  # a chat template that cannot write this may not be the one in use
        after = _rendered(tokenizer, "-", _STAND_IN).partition(_STAND_IN)[2]
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids.update([id_ for id_ in tokenizer.encode(after, add_special_tokens=False) if id_ in special][:1])
    return frozenset(ids)


def generate_rollouts(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    end_ids: frozenset[int],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """Have the chat model answer greedily, cut at the end-of-turn token, which is left out.

    Batches are padded on the left and use a key-value cache; in float32 their size changes no token.

    Args:
        model: The chat model, a Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: What to answer.
        max_new_tokens: Longest answer.
        batch_size: Rows in a batch.
        end_ids: See `end_of_turn_ids`.
        progress: Told the number of rows done.

    Returns:
        A row for each prompt; its answer may be empty.

    Raises:
        StudyError: A row can become longer than the model's context, or a part of it has no token of its own.
    """
    import torch
    from transformers import GenerationConfig

    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    for prompt, row in zip(prompts, encoded, strict=True):
        _check_length(prompt, len(row.ids), max_new_tokens, context_length_of(model))
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else min(end_ids, default=0)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    rollouts = list[Rollout]()
    for start in range(0, len(prompts), batch_size):
        batch = encoded[start : start + batch_size]
        longest = max(len(row.ids) for row in batch)
        padding = [longest - len(row.ids) for row in batch]
        ids = torch.tensor([[pad_id] * n + row.ids for n, row in zip(padding, batch, strict=True)])
        is_real = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        with torch.inference_mode(), _generating(model, greedy):
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=is_real.to(model.device), generation_config=greedy
            )
        answers: list[list[int]] = output[:, longest:].tolist()
        for prompt, row, answer in zip(prompts[start : start + batch_size], batch, answers, strict=True):
            end = next((at for at, id_ in enumerate(answer) if id_ in end_ids), None)
            rollouts.append(_rollout(tokenizer, prompt, row, answer[:end], finished=end is not None))
        progress(len(rollouts))
        signals.check()
    return rollouts


def given_rollouts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    context_length: int | None,
) -> list[Rollout]:
    """Rows of answers that were given, each tokenized with its prompt as one string, and not cut anywhere.

    Args:
        tokenizer: The chat model's.
        prompts: What was answered.
        completions: The answers, one a prompt.
        context_length: See `context_length_of`.

    Returns:
        A row for each prompt; its answer may be empty.

    Raises:
        StudyError: A row is longer than the model's context, or a part of it has no token of its own.
    """
    rollouts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = _encode(tokenizer, prompt, completion)
        _check_length(prompt, len(row.ids), 0, context_length)
        rollouts.append(_rollout(tokenizer, prompt, row, completion, finished=None))
    return rollouts


def context_length_of(model: Any) -> int | None:
    """Most tokens of a row that a model takes; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def keep_answered(rollouts: Sequence[Rollout], *, n_drawn: int, n_with_input: int) -> Answered:
    """Drop rows whose answer is empty, and count what became of all.

    Args:
        rollouts: A row for each instruction.
        n_drawn: Rows drawn from the dataset.
        n_with_input: Of these, dropped because they have an input.

    Raises:
        StudyError: Every answer is empty.
    """
    kept = [rollout for rollout in rollouts if not rollout.is_empty]
    if not kept:
        raise StudyError(
            f"instruct: all {len(rollouts)} answers are empty",
            "check that instruct.template is the chat model's, or the completions of instruct.rollouts",
        )
    endings = [rollout.finished for rollout in kept]
    n_unfinished = None if None in endings else endings.count(False)
    return Answered(kept, RolloutCounts(n_drawn, n_with_input, len(rollouts) - len(kept), n_unfinished))


def section_positions(rollout: Rollout, section: SectionName) -> NDArray[np.bool_]:
    """Positions of a section in one row, `[T]`.

    rollout: i+e-1 .. T-3, from the last template token, which predicts the first answer token; the last two positions
    are left out, as in the post. user_prompt: s .. i-1, none beyond T-3. control: 0 .. s-1 and i .. i+e-2.
    """
    at = np.arange(len(rollout.token_ids))
    s, i, e = rollout.n_opening, rollout.closing_start, rollout.n_closing
    match section:
        case "rollout":
            return (at >= i + e - 1) & (at <= len(at) - 3)
        case "user_prompt":
            return (at >= s) & (at < i) & (at <= len(at) - 3)
        case "control":
            return (at < s) | ((at >= i) & (at <= i + e - 2))


def section_mask(rollouts: Sequence[Rollout], section: SectionName) -> SectionMask:
    """Positions of a section in rows padded on the right, as `pack` pads them."""
    positions = np.zeros((len(rollouts), max(len(rollout.token_ids) for rollout in rollouts)), bool)
    with_loss = positions.copy()
    for row, rollout in enumerate(rollouts):
        n = len(rollout.token_ids)
        positions[row, :n] = section_positions(rollout, section)
        with_loss[row, : n - 1] = positions[row, : n - 1]
    return SectionMask(positions, with_loss)


def pack(rollouts: Sequence[Rollout], pad_id: int) -> PackedRollouts:
    """Rows padded on the right to the longest one: causal attention then never sees padding, nor does it shift one.

    Args:
        rollouts: At least one.
        pad_id: Any token of the model's.
    """
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts])
    ids = np.full((len(rollouts), lengths.max()), pad_id, np.int64)
    for row, rollout in zip(ids, rollouts, strict=True):
        row[: len(rollout.token_ids)] = rollout.token_ids
    return PackedRollouts(ids, lengths)


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write JSONL, atomically. Each line also says which of how many it is, so that a cut file shows.

    The fields `instruction` and `completion` are those of `instruct.rollouts`.
    """
    lines = [
        json.dumps({"row": row, "n_rows": len(rollouts), **asdict(rollout)})
        for row, rollout in enumerate(rollouts, start=1)
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_rollouts(path: Path) -> list[Rollout]:
    """Read what `write_rollouts` wrote.

    Raises:
        StudyError: It is not there, or not whole.
    """
    try:
        rollouts = list[Rollout]()
        n_rows = None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            fields = json.loads(line)
            row, n_rows = fields.pop("row"), fields.pop("n_rows")
            if row != number:
                raise ValueError(f"line {number} is row {row}")
            rollouts.append(Rollout(**{**fields, "token_ids": tuple(fields["token_ids"])}))
        if len(rollouts) != n_rows:
            raise ValueError(f"the file ends after {len(rollouts)} rows")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path}: the rollouts cannot be read: {error}", "delete that file and run again") from error
    return rollouts


class _Row(NamedTuple):
    """Tokens of a row, and the part that each belongs to."""

    ids: list[int]
    parts: list[int]


def _rendered(tokenizer: "PreTrainedTokenizerBase", user: str, assistant: str | None = None) -> str:
    """A conversation in the tokenizer's chat template; without an answer, up to where that begins."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise StudyError("pair.chat: its tokenizer has no chat template", "set instruct.template")
    messages = [{"role": "user", "content": user}]
    if assistant is not None:
        messages.append({"role": "assistant", "content": assistant})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=assistant is None)
    except (TemplateError, ValueError) as error:
        raise StudyError(f"pair.chat: its chat template cannot be used: {error}", "set instruct.template") from error
    assert isinstance(text, str)
    return text


def _encode(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, completion: str = "") -> _Row:
    """Tokenize a prompt, and an answer that was given, as one string.

    A token belongs to the part in which its first character other than a space lies; one of spaces only goes with the
    token after it, the last of a row with the answer.

    Raises:
        StudyError: A part of the prompt has no token of its own, or the tokenizer does not tell characters.
    """
    if not tokenizer.is_fast:
        raise StudyError(
            "pair.chat: its tokenizer does not tell where a token lies in the text (it is not a fast one)",
            "save the checkpoint's tokenizer as tokenizer.json",
        )
    text = prompt.text + completion
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]  # pyright: ignore[reportAssignmentType]
    ids: list[int] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    ends = np.cumsum([len(prompt.opening), len(prompt.user), len(prompt.closing)]).tolist()
    part, parts = _ANSWER, list[int]()
    for start, end in reversed(offsets):
        first = next((char for char in range(start, end) if text[char] != " "), None)
        part = part if first is None else bisect_right(ends, first)
        parts.append(part)
    parts.reverse()
    if prompt.bos_token_id is not None:
        ids, parts = [prompt.bos_token_id, *ids], [_OPENING, *parts]
    for name, number, part_text in (
        ("opening template", _OPENING, prompt.opening),
        ("instruction", _USER, prompt.user),
        ("closing template", _CLOSING, prompt.closing),
    ):
        if part_text.strip(" ") and number not in parts:
            raise StudyError(
                f"instruct: {prompt.where}: its {name} cannot be found among its tokens: none begins in it",
                "leave that row out, or set an instruct.template that keeps spaces or lines around {instruction}",
            )
    return _Row(ids, parts)


def _rollout(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, row: _Row, answer: str | list[int], *, finished: bool | None
) -> Rollout:
    """A row whose answer is its text, tokenized with the prompt already, or ids that follow the prompt's."""
    is_text = isinstance(answer, str)
    return Rollout(
        instruction=prompt.instruction,
        prompt=prompt.text,
        completion=answer if is_text else str(tokenizer.decode(answer, clean_up_tokenization_spaces=False)),
        token_ids=tuple(row.ids if is_text else [*row.ids, *answer]),
        n_opening=row.parts.count(_OPENING),
        closing_start=row.parts.count(_OPENING) + row.parts.count(_USER),
        n_closing=row.parts.count(_CLOSING),
        finished=finished,
    )


def _check_length(prompt: Prompt, n_tokens: int, n_new: int, context_length: int | None) -> None:
    if context_length is not None and n_tokens + n_new > context_length:
        answer = f" and up to {n_new} new ones" if n_new else ""
        raise StudyError(
            f"instruct: {prompt.where}: {n_tokens} tokens{answer} do not fit the model's context of {context_length}",
            "leave that row out" + (", or lower instruct.max_new_tokens" if n_new else ""),
        )


@contextmanager
def _generating(model: Any, config: Any) -> Iterator[None]:
    """Generate under one configuration alone.

    transformers 5.23 fills what a given one leaves open from the checkpoint's: sampling flags that it then warns about,
    and Qwen1.5's repetition penalty, with which the answer is no longer the greedy one.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
