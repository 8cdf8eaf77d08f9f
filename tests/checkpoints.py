"""Small random Hugging Face checkpoints on disk, real classes and real tokenizers, for the tests to load offline."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

WORDS = "the cat sat on a mat and the dog ran to the red house by the sea where old men sing of ships".split()
SPECIALS = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
GROUPED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
SIZES = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt_neox": {**COMMON, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
}


def words_of(seed: int, n: int) -> str:
    """Deterministic text of n words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())


def make_tokenizer(vocab_size: int = 300, *, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the words above; bos is id 0, eos 1, pad 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words_of(s, 500) for s in range(4)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIALS[3:],
    )
    fast.chat_template = chat_template
    return fast


def make_checkpoint(directory: Path, architecture: str = "llama", *, seed: int = 0, **overrides: object) -> Path:
    """Write a random float32 checkpoint with its tokenizer; weights large enough that every layer matters.

    Args:
        directory: Where to; created.
        architecture: A key of SIZES, which is Hugging Face's model_type.
        seed: Of the weights.
        overrides: Fields of the Hugging Face configuration.

    Returns:
        The directory.
    """
    tokenizer = make_tokenizer()
    fields = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(architecture, **{**fields, **SIZES[architecture], **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                is_offset = architecture.startswith("gemma")  # Gemma's norms multiply by 1 + weight
                parameter.copy_(noise * 0.1 + (0.0 if is_offset or name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * 0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_chat_of(base: Path, directory: Path, *, seed: int = 5, by: float = 0.02) -> Path:
    """Write a copy of a checkpoint whose weights are moved a little, as fine-tuning would."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory
