from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_transfer.config import SAESpec
from sae_transfer.cost.shape import model_shape, sae_params
from sae_transfer.errors import StudyError
from tests.checkpoints import SIZES
from tests.cost.shapes import GEMMA, MISTRAL, QWEN


@pytest.mark.parametrize(
    # As counted by Hugging Face on the released checkpoints.
    ("config", "n_params"),
    [(QWEN, 463_987_712), (MISTRAL, 7_241_732_096), (GEMMA, 2_506_172_416)],
)
def test_parameters_of_the_posts_models_are_exact(config: dict[str, Any], n_params: int) -> None:
    assert model_shape(config).n_params == n_params


@pytest.mark.parametrize("architecture", sorted(SIZES))
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_class(architecture: str, tied: bool) -> None:
    config = AutoConfig.for_model(architecture, **SIZES[architecture], vocab_size=300, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = model_shape(config.to_dict())
    assert shape.n_params == model.num_parameters()
    assert (shape.d_model, shape.n_layers, shape.tied) == (32, 3, tied)


def test_biases_that_a_configuration_asks_for_are_counted() -> None:
    sizes = {**SIZES["llama"], "vocab_size": 300, "attention_bias": True, "mlp_bias": True}
    config = AutoConfig.for_model("llama", **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model_shape(config.to_dict()).n_params == model.num_parameters()


def test_a_configuration_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(StudyError, match="got model_type mamba; expected one of llama, mistral"):
        model_shape({"model_type": "mamba"})
    with pytest.raises(StudyError, match=r"hidden_size is missing; expected the config.json of a llama model"):
        model_shape({"model_type": "llama"})


@pytest.mark.parametrize(
    ("architecture", "n_params"),
    # 2 * 8 * 32 weights, 8 values of the decoder bias, and 1, 3 or 2 vectors of 32.
    [("standard", 552), ("topk", 552), ("batchtopk", 552), ("gated", 616), ("jumprelu", 584)],
)
def test_parameters_of_an_sae(architecture: str, n_params: int) -> None:
    assert sae_params(SAESpec(architecture, 32, "k", 1, 0), 8) == n_params
