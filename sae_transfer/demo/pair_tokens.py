"""The pair's tokenizer and chat format, and the demo's text and questions as token ids."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sae_transfer.demo.text import QuestionPair

VOCAB_SIZE = 2048
CONTEXT_SIZE = 128
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, EOS, PAD, USER, ASSISTANT, END = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the demo pair knows the roles user and assistant only') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

IGNORED = -100
"""Label of a position whose loss does not count."""


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens, trained on the documents; it adds no BOS by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        extra_special_tokens=list(SPECIAL_TOKENS[USER:]),
        model_max_length=2 * CONTEXT_SIZE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text of any length, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def pack(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, n_rows: int | None = None
) -> Int[Tensor, "seq pos"]:
    """Cut documents into rows as the demo's study does: BOS between documents, BOS first in each row.

    Args:
        documents: Texts, packed in this order.
        tokenizer: The pair's tokenizer.
        n_rows: Rows wanted; unset gives all that the documents fill.

    Returns:
        Token ids; the incomplete last row is dropped.
    """
    body = CONTEXT_SIZE - 1
    stream: list[int] = []
    for document in documents:
        if n_rows is not None and len(stream) >= n_rows * body:
            break
        stream += [BOS, *encode(document, tokenizer)]
    n_full = len(stream) // body if n_rows is None else min(n_rows, len(stream) // body)
    return with_bos(torch.tensor(stream[: n_full * body]).view(n_full, body))


def with_bos(rows: Int[Tensor, "seq pos"]) -> Int[Tensor, "seq pos"]:
    """The rows, each one longer by a BOS at position 0."""
    return torch.nn.functional.pad(rows, (1, 0), value=BOS)


def chat_prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a question in the chat format, up to where the answer begins."""
    message = [{"role": "user", "content": question}]
    return encode(str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)), tokenizer)


def answer_batch(
    pairs: Sequence[QuestionPair], tokenizer: PreTrainedTokenizerBase
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Question pairs in the chat format, padded on the right.

    Args:
        pairs: Questions with their answers.
        tokenizer: The pair's tokenizer.

    Returns:
        Token ids, and labels that are `IGNORED` everywhere but on the answer and its end-of-turn token.
    """
    rows = [(chat_prompt(pair.question, tokenizer), [*encode(pair.answer, tokenizer), END]) for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels
