"""Make the embedded pair again: `python -m sae_transfer.demo.make_pair OUT_DIR`.

The base model reads the training half of `text`; the chat model is the base model fine-tuned on questions about the
same modules, for as few steps as make it end its answers, so that it stays near the base. Nothing is planted: the large
norm of BOS in both models is what training leads to. One thread, one seed, float32: the same Python, torch and machine
give the same weights. Beside the models, `pair.json` keeps what was measured on held-out text and questions.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sae_transfer.demo import measure_pair, pair_tokens, text
from sae_transfer.demo.pair_tokens import BOS, CONTEXT_SIZE, END, EOS, IGNORED, PAD
from sae_transfer.demo.text import QuestionPair

BASE_TOKENS = 9_000_000
BASE_BATCH_SIZE = 8
BASE_LR = 3e-3
BASE_DECAY_SHARE = 0.5
CHAT_BATCH_SIZE = 16
CHAT_LR = 3e-4
"""After 200 steps, held-out text costs 0.24 nats more than for the base model; with 5e-4 it is 0.41, with 1e-3 0.93."""

CHAT_STEPS_BEFORE_TEST = 200
CHAT_STEPS_BETWEEN_TESTS = 50
MAX_CHAT_STEPS = 450
MAX_ANSWER_TOKENS = 45
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1
WANTED_ENDED_SHARE = 0.9
N_MEASURED_QUESTIONS = 100
N_MEASURED_ROWS = 256

_log = logging.getLogger(__name__)


def make_pair(out_dir: Path, *, base_tokens: int = BASE_TOKENS, seed: int = 0) -> dict[str, object]:
    """Train both models and save them as `out_dir/base` and `out_dir/chat`, with `pair.json` beside them.

    Args:
        out_dir: Where to write; made when missing.
        base_tokens: Tokens that the base model is trained on, with repetitions (the training text has about 2M).
        seed: Of the initial weights and of both draws of batches.

    Returns:
        What was measured, as in `pair.json`.
    """
    started = time.monotonic()
    documents = text.pretraining_documents()
    tokenizer = pair_tokens.train_tokenizer(documents)
    stream = pair_tokens.pack(documents, tokenizer)[:, 1:].flatten()
    _log.info("training text: %d documents, %d tokens", len(documents), len(stream))

    model = new_model(seed)
    train_base(model, stream, n_steps=base_tokens // (BASE_BATCH_SIZE * CONTEXT_SIZE), seed=seed)
    base_seconds = time.monotonic() - started
    save(model, tokenizer, out_dir / "base", eos_token_id=EOS)
    base_report = measure(model, tokenizer)

    started = time.monotonic()
    chat_steps = train_chat(model, tokenizer, seed=seed)
    chat_seconds = time.monotonic() - started
    save(model, tokenizer, out_dir / "chat", eos_token_id=END)
    chat_report = measure(model, tokenizer)

    report: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "seed": seed,
        "n_parameters": model.num_parameters(),
        "training_text_tokens": len(stream),
        "base_tokens": base_tokens // (BASE_BATCH_SIZE * CONTEXT_SIZE) * BASE_BATCH_SIZE * CONTEXT_SIZE,
        "base_seconds": round(base_seconds, 1),
        "chat_steps": chat_steps,
        "chat_questions": chat_steps * CHAT_BATCH_SIZE,
        "chat_seconds": round(chat_seconds, 1),
        "held_out": {"base": base_report, "chat": chat_report},
    }
    (out_dir / "pair.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained model of 4 layers and about a million parameters."""
    config = LlamaConfig(
        vocab_size=pair_tokens.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * CONTEXT_SIZE,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_base(model: LlamaForCausalLM, stream: Int[Tensor, " tok"], *, n_steps: int, seed: int) -> None:
    """Next-token training on windows of the stream, each with BOS put before it.

    Args:
        model: Trained in place.
        stream: The training text, with BOS between documents.
        n_steps: Batches of `BASE_BATCH_SIZE` windows of `CONTEXT_SIZE` tokens.
        seed: Of the draw of windows.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, BASE_LR)
    offsets = torch.arange(CONTEXT_SIZE - 1)
    started, recent = time.monotonic(), 0.0
    model.train()
    for step in range(n_steps):
        left = (n_steps - step) / (n_steps * BASE_DECAY_SHARE)
        _set_lr(optimizer, BASE_LR * min((step + 1) / WARMUP_STEPS, left, 1.0))
        starts = torch.randint(len(stream) - CONTEXT_SIZE, (BASE_BATCH_SIZE, 1), generator=generator)
        ids = pair_tokens.with_bos(stream[starts + offsets])
        recent += _train_step(model, optimizer, ids, ids)
        if (step + 1) % 200 == 0:
            rate = (step + 1) * ids.numel() / (time.monotonic() - started)
            _log.info("base: step %d of %d, loss %.3f, %.0f tokens/s", step + 1, n_steps, recent / 200, rate)
            recent = 0.0
    model.eval()


def train_chat(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> int:
    """Fine-tuning on training questions, the loss on answers only, until held-out answers end.

    Whether they end is tested on the questions that `measure` reports on: the share that is reported decided when to
    stop.

    Args:
        model: The trained base model, changed in place.
        tokenizer: Its tokenizer.
        seed: Of the draw of questions.

    Returns:
        Steps taken, at most `MAX_CHAT_STEPS`.
    """
    pairs = [
        pair
        for pair in text.question_pairs(held_out=False)
        if len(pair_tokens.encode(pair.answer, tokenizer)) <= MAX_ANSWER_TOKENS
    ]
    questions = [pair.question for pair in measured_questions()]
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, CHAT_LR)
    order: list[int] = []
    model.train()
    for step in range(MAX_CHAT_STEPS):
        if len(order) < CHAT_BATCH_SIZE:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        batch, order = order[:CHAT_BATCH_SIZE], order[CHAT_BATCH_SIZE:]
        _set_lr(optimizer, CHAT_LR * min((step + 1) / WARMUP_STEPS, 1.0))
        loss = _train_step(model, optimizer, *pair_tokens.answer_batch([pairs[i] for i in batch], tokenizer))
        after_first = step + 1 - CHAT_STEPS_BEFORE_TEST
        if after_first >= 0 and after_first % CHAT_STEPS_BETWEEN_TESTS == 0:
            model.eval()
            share = measure_pair.ended_share(model, tokenizer, questions)
            _log.info(
                "chat: step %d of %d training questions, loss %.3f, ended %.2f", step + 1, len(pairs), loss, share
            )
            if share >= WANTED_ENDED_SHARE:
                return step + 1
            model.train()
    model.eval()
    _log.warning("chat: after %d steps fewer than %.0f%% of answers end", MAX_CHAT_STEPS, 100 * WANTED_ENDED_SHARE)
    return MAX_CHAT_STEPS


def measured_questions() -> list[QuestionPair]:
    """The held-out questions that the pair is measured on."""
    return text.question_pairs(held_out=True)[:N_MEASURED_QUESTIONS]


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Held-out losses in nats, share of ended answers, and scaled norms of BOS and of the largest other token."""
    pairs = measured_questions()
    rows = pair_tokens.pack(text.study_documents(), tokenizer, N_MEASURED_ROWS)
    norms = measure_pair.site_norms(model, rows)
    measured = {
        "text_loss": measure_pair.text_loss(model, rows),
        "answer_loss": measure_pair.answer_loss(model, tokenizer, pairs),
        "ended_share": measure_pair.ended_share(model, tokenizer, [pair.question for pair in pairs]),
        "scaled_norm_bos_first": norms.bos_first,
        "scaled_norm_bos_later_mean": norms.bos_later_mean,
        "scaled_norm_bos_later_max": norms.bos_later_max,
        "scaled_norm_largest_other": norms.largest_other,
    }
    _log.info("held out: %s", ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    return {name: round(value, 4) for name, value in measured.items()}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path, *, eos_token_id: int) -> None:
    """Write a Hugging Face directory whose generation ends at `eos_token_id`."""
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=eos_token_id, pad_token_id=PAD)
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes a file that only its owner may read
    tokenizer.save_pretrained(directory)


def _optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Int[Tensor, "batch pos"],
    labels: Int[Tensor, "batch pos"],
) -> float:
    """One step on the mean loss in nats over the labels that count; returns that loss."""
    loss = measure_pair.loss_sum(model, ids, labels) / (labels[:, 1:] != IGNORED).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main() -> None:
    """Command line: see the module's first line."""
    parser = argparse.ArgumentParser(description="Train the demo's base and chat model on the text of this Python.")
    parser.add_argument("out_dir", type=Path, help="gets base/, chat/ and pair.json (10 MB)")
    parser.add_argument("--base-tokens", type=int, default=BASE_TOKENS, help="tokens for the base model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    make_pair(arguments.out_dir, base_tokens=arguments.base_tokens, seed=arguments.seed)


if __name__ == "__main__":
    main()
