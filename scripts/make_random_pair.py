"""Write a random-weight pair in the shapes of a real one, token ids, and a study over them; for the smoke test.

    .venv/bin/python scripts/make_random_pair.py mistral-7b DIR

The base and the chat model are one set of weights under two names: the disk holds it once.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
QWEN = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
# name -> (model_type, fields beside its defaults, which are Mistral-7B's)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-7b": ("mistral", {"sliding_window": None}),
    "qwen1.5-0.5b": (
        "qwen2",
        {**QWEN, "num_key_value_heads": 16, "vocab_size": 151_936, "tie_word_embeddings": True},
    ),
    "mistral-tiny": ("mistral", {**TINY, "num_key_value_heads": 2, "vocab_size": 256, "sliding_window": None}),
    "qwen-tiny": ("qwen2", {**TINY, "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": True}),
}


def write_pair(name: str, directory: Path, device: str) -> int:
    """Write `base` and `chat` as bfloat16 safetensors, made on the device; the number of layers."""
    kind, fields = MODELS[name]
    config = AutoConfig.for_model(kind, **fields)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(directory / "base")
    (directory / "chat").mkdir()
    for path in (directory / "base").iterdir():
        os.link(path, directory / "chat" / path.name)
    return config.num_hidden_layers


def main() -> None:
    """Write models, ids and study."""
    parser = argparse.ArgumentParser(description="A random pair, token ids and a study over them.")
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--width", type=int, required=True, help="Features of the SAE.")
    parser.add_argument("--train-tokens", type=int, required=True)
    parser.add_argument("--evaluation-tokens", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="Tokens a sequence.")
    parser.add_argument("--batch", type=int, required=True, help="Activations a training step.")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    directory.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_layers = write_pair(arguments.name, directory, device)
    _, fields = MODELS[arguments.name]
    context = arguments.context
    n_rows = (arguments.train_tokens + arguments.evaluation_tokens) // context + 2
    ids = np.random.default_rng(0).integers(fields.get("vocab_size", 32_000), size=(n_rows, context), dtype=np.int32)
    np.save(directory / "ids.npy", ids)
    study = {
        "pair": {"base": str(directory / "base"), "chat": str(directory / "chat")},
        "site": {"layer": n_layers // 2, "hook": "resid_pre"},
        "tokens": {"dataset": str(directory / "ids.npy"), "context_size": context},
        "saes": {"widths": [arguments.width], "l1_coefficient": [3]},
        "train": {
            "models": ["base"],
            "tokens": arguments.train_tokens,
            "batch_size": arguments.batch,
            "scale_tokens": 4 * context,
        },
        "evaluate": {"tokens": arguments.evaluation_tokens, "batch_size": 4, "outlier_threshold": 1000},
    }
    (directory / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")


if __name__ == "__main__":
    main()
