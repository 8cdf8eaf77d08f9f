"""A hub cache made by hand: small random checkpoints and SAEs under real names, found offline as if once downloaded."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from tests.checkpoints import make_chat_of, make_checkpoint, make_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(hub: Path, repository: str) -> Path:
    """Where a repository's files of the newest commit lie in a cache; made, with its `main` pointing there.

    Args:
        hub: The cache: `$HF_HOME/hub`, or `huggingface_hub.constants.HF_HUB_CACHE`.
        repository: `org/name`.
    """
    root = hub / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    directory = root / "snapshots" / COMMIT
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def make_hub_pair(
    hub: Path,
    base: str,
    chat: str,
    architecture: str,
    *,
    bos: str | None = "<bos>",
    eos: tuple[str, str] = ("<eos>", "<eos>"),
    template_tokens: Sequence[str] = (),
    **overrides: object,
) -> None:
    """Put a small random pair into a cache under its real names.

    Args:
        hub: The cache.
        base: Hub id of the base model.
        chat: Hub id of the chat model.
        architecture: A key of `tests.checkpoints.SIZES`.
        bos: BOS of both tokenizers; None for none.
        eos: EOS of either tokenizer.
        template_tokens: Special tokens that the chat model's template needs.
        overrides: Fields of the Hugging Face configuration.
    """
    specials = [*eos, *template_tokens]
    sides = {base: _tokenizer(bos, eos[0], specials), chat: _tokenizer(bos, eos[1], specials)}
    fields = {"vocab_size": len(sides[base]), "max_position_embeddings": 512, **overrides}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = getattr(sides[base], name)
    make_checkpoint(snapshot(hub, base), architecture, **fields)
    make_chat_of(snapshot(hub, base), snapshot(hub, chat))
    for repository, tokenizer in sides.items():
        tokenizer.save_pretrained(snapshot(hub, repository))


def _tokenizer(bos: str | None, eos: str, specials: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with other special tokens, the same ids whichever of them has which role."""
    trained = make_tokenizer(chat_template=None).backend_tokenizer
    trained.add_special_tokens([token for token in dict.fromkeys([bos, *specials]) if token is not None])
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=bos, eos_token=eos, pad_token="<pad>")


def make_hub_sae(hub: Path, release: str, sae_id: str, *, hook_name: str, d_in: int = 32, d_sae: int = 64) -> None:
    """Put a small random SAE into a cache, in the files in which its SAELens release keeps its SAEs.

    Args:
        hub: The cache.
        release: Of SAELens's table.
        sae_id: In that release.
        hook_name: What its configuration names, where it names a site.
        d_in: Width of the site.
        d_sae: Number of features.
    """
    entry = get_pretrained_saes_directory()[release]
    directory = snapshot(hub, entry.repo_id) / entry.saes_map[sae_id]
    generator = torch.Generator().manual_seed(d_sae)
    weights = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator) * 0.3,
        "W_dec": torch.randn(d_sae, d_in, generator=generator) * 0.3,
        "b_enc": torch.randn(d_sae, generator=generator) * 0.1,
        "b_dec": torch.randn(d_in, generator=generator) * 0.1,
    }
    _WRITERS[entry.conversion_func](directory, weights, entry.model, hook_name)


Weights = dict[str, torch.Tensor]


def _write_saelens(directory: Path, weights: Weights, model: str, hook_name: str) -> None:
    d_in, d_sae = weights["W_enc"].shape
    config = {"model_name": model, "hook_name": hook_name, "hook_layer": int(hook_name.split(".")[1])}
    config |= {"hook_head_index": None, "context_size": 128, "dataset_path": "-", "prepend_bos": True}
    config |= {"d_in": d_in, "d_sae": d_sae, "dtype": "torch.float32", "activation_fn_str": "relu"}
    config |= {"normalize_activations": "none", "apply_b_dec_to_input": False, "architecture": "standard"}
    _write_json(directory / "cfg.json", config)
    save_file(weights, directory / "sae_weights.safetensors")


def _write_gemma_scope(directory: Path, weights: Weights, model: str, hook_name: str) -> None:
    directory.mkdir(parents=True)
    arrays = {name.replace("W_", "w_"): tensor.numpy() for name, tensor in weights.items()}
    np.savez(directory / "params.npz", allow_pickle=False, **arrays, threshold=np.full(len(weights["b_enc"]), 0.5))


def _write_gemma_scope_2(directory: Path, weights: Weights, model: str, hook_name: str) -> None:
    _write_json(directory / "config.json", {"architecture": "jump_relu", "model_name": model})
    tensors = {name.replace("W_", "w_"): tensor for name, tensor in weights.items()}
    save_file({**tensors, "threshold": torch.full_like(weights["b_enc"], 0.5)}, directory / "params.safetensors")


def _write_llama_scope(directory: Path, weights: Weights, model: str, hook_name: str) -> None:
    d_in, d_sae = weights["W_enc"].shape
    config = {"d_model": d_in, "d_sae": d_sae, "hook_point_in": hook_name, "jump_relu_threshold": 0.5}
    _write_json(directory / "hyperparams.json", {**config, "dataset_average_activation_norm": {"in": 11.0}})
    (directory / "checkpoints").mkdir()
    tensors = {"encoder.weight": weights["W_enc"].T, "encoder.bias": weights["b_enc"]}
    tensors |= {"decoder.weight": weights["W_dec"].T, "decoder.bias": weights["b_dec"]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "checkpoints" / "final.safetensors")


def _write_dictionary_learning(directory: Path, weights: Weights, model: str, hook_name: str) -> None:
    d_in, d_sae = weights["W_enc"].shape
    trainer = {"layer": int(hook_name.split(".")[1]), "dict_class": "BatchTopKSAE", "activation_dim": d_in}
    trainer |= {"dict_size": d_sae, "lm_name": model}
    _write_json(directory / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 1024}})
    tensors = {"encoder.weight": weights["W_enc"].T, "encoder.bias": weights["b_enc"], "b_dec": weights["b_dec"]}
    tensors |= {"decoder.weight": weights["W_dec"].T, "threshold": torch.tensor(0.5)}
    torch.save(tensors, directory / "ae.pt")


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# SAELens's conversion function -> what writes the files that it reads.
_WRITERS = {
    None: _write_saelens,
    "gemma_2": _write_gemma_scope,
    "gemma_3": _write_gemma_scope_2,
    "llama_scope": _write_llama_scope,
    "dictionary_learning_1": _write_dictionary_learning,
}
