"""What is measured on the embedded pair: losses on held-out text, ended answers, and the norm of BOS."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sae_transfer.demo.pair_tokens import BOS, END, IGNORED, PAD, answer_batch, chat_prompt
from sae_transfer.demo.text import QuestionPair

SITE_LAYER = 2
"""Norms are taken at `blocks.2.hook_resid_pre`, the site of the demo's study."""

MAX_NEW_TOKENS = 64
_BATCH_SIZE = 32


class SiteNorms(NamedTuple):
    """Scaled norms, `||x|| sqrt(d_model) / mean ||x||` with the mean over all tokens, of three kinds of token."""

    bos_first: float
    """BOS at position 0. It attends to itself alone, so this is one number, whatever the text."""

    bos_later_mean: float
    """BOS between two documents, mean over all at positions from 1 on."""

    bos_later_max: float
    """The largest of those."""

    largest_other: float
    """The largest of all tokens that are not BOS."""


def loss_sum(
    model: LlamaForCausalLM, ids: Int[Tensor, "batch pos"], labels: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Sum of next-token cross-entropies in nats over the positions whose label is not `IGNORED`."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


@torch.inference_mode()
def text_loss(model: LlamaForCausalLM, rows: Int[Tensor, "seq pos"]) -> float:
    """Mean next-token cross-entropy in nats over all positions that have a next token, BOS targets included."""
    total = sum(loss_sum(model, batch, batch).item() for batch in rows.split(_BATCH_SIZE))
    return total / rows[:, 1:].numel()


@torch.inference_mode()
def answer_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[QuestionPair]) -> float:
    """Mean next-token cross-entropy in nats over the tokens of the answers, their end-of-turn tokens included."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), _BATCH_SIZE):
        ids, labels = answer_batch(pairs[start : start + _BATCH_SIZE], tokenizer)
        total += loss_sum(model, ids, labels).item()
        count += int((labels[:, 1:] != IGNORED).sum())
    return total / count


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]
) -> Int[Tensor, "batch pos"]:
    """Greedy answers to questions in the chat format, all in one batch padded on the left.

    Args:
        model: Either model of the pair.
        tokenizer: Their tokenizer.
        questions: Without the chat format.

    Returns:
        The new tokens only, at most `MAX_NEW_TOKENS` a row; after `<|end|>` a row holds padding.
    """
    prompts = [chat_prompt(question, tokenizer) for question in questions]
    width = max(len(prompt) for prompt in prompts)
    # Padded by hand: the tokenizer would keep a request to pad as its own state, and save it.
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    greedy = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=END, pad_token_id=PAD)
    # transformers 5.23 types `generate` for a protocol that its own models do not meet.
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    return generate(ids, attention_mask=ids.ne(PAD).long(), generation_config=greedy)[:, width:]


def ended_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> float:
    """Share of questions whose greedy answer ends with `<|end|>` within `MAX_NEW_TOKENS` new tokens."""
    ended = (answers(model, tokenizer, questions) == END).any(dim=1)
    return int(ended.sum()) / len(ended)


@torch.inference_mode()
def site_norms(model: LlamaForCausalLM, rows: Int[Tensor, "seq pos"]) -> SiteNorms:
    """Scaled norms at `blocks.2.hook_resid_pre` over packed text, in float32."""
    norms = torch.cat(
        [
            model(input_ids=batch, output_hidden_states=True).hidden_states[SITE_LAYER].float().norm(dim=-1)
            for batch in rows.split(_BATCH_SIZE)
        ]
    )
    scaled = norms * math.sqrt(model.config.hidden_size) / norms.double().mean()
    is_bos = rows == BOS
    bos_later = scaled[:, 1:][is_bos[:, 1:]]
    return SiteNorms(
        bos_first=scaled[:, 0].max().item(),
        bos_later_mean=bos_later.mean().item(),
        bos_later_max=bos_later.max().item(),
        largest_other=scaled[~is_bos].max().item(),
    )
