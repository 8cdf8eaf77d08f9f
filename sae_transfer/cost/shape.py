"""Sizes of language models and SAEs, counted exactly from a config.json and a study alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_transfer.config import SAESpec
from sae_transfer.errors import StudyError

# Hugging Face's model_type -> whether embedding and unembedding are one matrix where config.json does not say.
TIED_BY_DEFAULT = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": False,
    "gemma": True,
    "gemma2": True,
    "gemma3_text": True,
    "gpt_neox": False,
    "gpt2": True,
}
# Their soft-cap on attention scores is beyond SDPA (transformers 5.23).
WITH_CAPPED_SCORES = ("gemma2",)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model.

    Attributes:
        d_model: Width of the residual stream.
        n_heads: Of queries.
        d_attention: Heads times their width.
        d_kv: Key-value heads times their width.
        d_mlp: Width inside the MLP.
        n_layers: Decoder layers.
        d_vocab: Token ids.
        n_params_layer: Parameters of one layer, biases and norms included.
        n_params_embedding: Token embedding, and position embedding where it is learned.
        n_params_final_norm: The norm before the unembedding.
        tied: Whether the unembedding is the token embedding.
        fuses_attention: Whether Hugging Face's layers never hold the scores `[batch heads pos pos]`.
    """

    d_model: int
    n_heads: int
    d_attention: int
    d_kv: int
    d_mlp: int
    n_layers: int
    d_vocab: int
    n_params_layer: int
    n_params_embedding: int
    n_params_final_norm: int
    tied: bool
    fuses_attention: bool

    @property
    def n_params(self) -> int:
        """All parameters; tied ones count once."""
        unembedding = 0 if self.tied else self.d_vocab * self.d_model
        return self.n_layers * self.n_params_layer + self.n_params_embedding + self.n_params_final_norm + unembedding


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read sizes and count parameters, exactly.

    Args:
        config: The content of a checkpoint's config.json.

    Returns:
        The shape.

    Raises:
        StudyError: The model_type is not one that can be counted, or a size is missing.
    """
    kind = config.get("model_type")
    if kind not in TIED_BY_DEFAULT:
        raise StudyError(f"config.json: got model_type {kind}; expected one of {', '.join(TIED_BY_DEFAULT)}")
    try:
        tied = bool(config.get("tie_word_embeddings", TIED_BY_DEFAULT[kind]))
        if kind == "gpt2":
            d, n_layers, n_heads = config["n_embd"], config["n_layer"], config["n_head"]
            mlp = config.get("n_inner") or 4 * d
        else:
            d, n_layers, n_heads = (
                config[f"{key}"] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
            )
            mlp = config["intermediate_size"]
        d_vocab = config["vocab_size"]
        positions = config["n_positions"] * d if kind == "gpt2" else 0
    except KeyError as error:
        raise StudyError(
            f"config.json: {error.args[0]} is missing; expected the config.json of a {kind} model"
        ) from error
    head = config.get("head_dim") or d // n_heads
    q, kv = n_heads * head, (config.get("num_key_value_heads") or n_heads) * head
    if kind in ("gpt2", "gpt_neox"):
        bias = 4 * d if config.get("attention_bias", True) else 0
        layer, norm = 4 * d * d + bias + 2 * d * mlp + mlp + d + 2 * 2 * d, 2 * d
    else:
        bias = q + 2 * kv if kind == "qwen2" else (q + 2 * kv + d) if config.get("attention_bias") else 0
        bias += (2 * mlp + d) if config.get("mlp_bias") else 0
        norms = {"gemma2": 4 * d, "gemma3_text": 4 * d + 2 * head, "qwen3": 2 * d + 2 * head}.get(kind, 2 * d)
        layer, norm = 2 * d * q + 2 * d * kv + 3 * d * mlp + bias + norms, d
    fuses = kind not in WITH_CAPPED_SCORES
    return ModelShape(d, n_heads, q, kv, mlp, n_layers, d_vocab, layer, d_vocab * d + positions, norm, tied, fuses)


def sae_params(spec: SAESpec, d_in: int) -> int:
    """Parameters of one SAE: two matrices, the decoder's bias `[d_in]`, and the architecture's vectors `[d_sae]`."""
    vectors = {"gated": 3, "jumprelu": 2}.get(spec.architecture, 1)
    return 2 * d_in * spec.d_sae + d_in + vectors * spec.d_sae
