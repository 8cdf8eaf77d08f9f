"""Instruction-formatted training sequences: instructions in the chat template, with the chat model's own answers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sae_transfer.errors import StudyError
from sae_transfer.models.chat import (
    Rollout,
    end_of_turn_ids,
    generate_rollouts,
    make_prompts,
    pack,
    read_rollouts,
    write_rollouts,
)
from sae_transfer.models.instructions import read_instructions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL_ROWS = 2**62
BATCHES_AT_ONCE = 8  # answered between two looks at whether there are enough tokens


def chat_sequences(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dataset: str,
    n_held_out: int,
    seed: int,
    template: str | None,
    max_new_tokens: int,
    batch_size: int,
    n_tokens: int,
    parts: Path,
    progress: Callable[[int], None],
) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """Have the chat model answer instructions that evaluation does not use, until there are enough tokens.

    Args:
        model: The chat model.
        tokenizer: Its tokenizer.
        dataset: As in `read_instructions`.
        n_held_out: How many rows evaluation draws with `seed`; those are left out.
        seed: Also of the order in which the others are answered.
        template: Prompt with `{instruction}` in it; None takes the tokenizer's chat template.
        max_new_tokens: Longest answer.
        batch_size: Rows a batch.
        n_tokens: How many tokens are wanted, prompts included.
        parts: Directory of these answers, where they are kept as they come: what is there is not made again.
        progress: Told the tokens made so far.

    Returns:
        Rows padded on the right `[seq pos]`, and which of their positions are real.

    Raises:
        StudyError: The dataset has too few instructions.
    """
    held_out = set(read_instructions(dataset, n=n_held_out, seed=seed).texts)
    texts = [text for text in read_instructions(dataset, n=ALL_ROWS, seed=seed).texts if text not in held_out]
    order = np.random.default_rng([seed, 1]).permutation(len(texts))
    end_ids = end_of_turn_ids(model, tokenizer)
    rollouts: list[Rollout] = []
    made = 0
    for start in range(0, len(order), batch_size * BATCHES_AT_ONCE):
        part = parts / f"{start}.jsonl"
        if not part.exists():
            chosen = [texts[i] for i in order[start : start + batch_size * BATCHES_AT_ONCE]]
            answered = generate_rollouts(
                model,
                tokenizer,
                make_prompts(tokenizer, chosen, template),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                end_ids=end_ids,
            )
            write_rollouts(part, answered)
        kept = [rollout for rollout in read_rollouts(part) if not rollout.is_empty]
        rollouts += kept
        made += sum(len(rollout.token_ids) for rollout in kept)
        progress(min(made, n_tokens))
        if made >= n_tokens:
            ids, lengths = pack(rollouts, pad_id=0)
            return ids, np.arange(ids.shape[1]) < lengths[:, None]
    raise StudyError(
        f"finetune.tokens: {n_tokens:,} tokens are asked for, and {len(texts):,} instructions of {dataset} with their"
        f" answers make {made:,}",
        "lower finetune.tokens, or name a larger instruct.dataset",
    )
