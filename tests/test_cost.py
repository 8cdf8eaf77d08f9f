from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_transfer.config import SAESpec, Study
from sae_transfer.cost import estimate, hours, model_shape, sae_params
from sae_transfer.errors import StudyError
from sae_transfer.study_file import parse_study
from tests.checkpoints import SIZES

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2816,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
GEMMA = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "vocab_size": 256000,
}


def study(layer: int = 16, **sections: Any) -> Study:
    required = {
        "pair": {"base": "a", "chat": "b"},
        "site": {"layer": layer, "hook": "resid_pre"},
        "tokens": {"dataset": "x"},
    }
    return parse_study({**required, **sections}, "study.yaml")


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


def test_mistral_on_one_h200_takes_the_hours_worked_out_on_paper() -> None:
    # 790 TFLOP/s and 4.3 TB/s: language model 2.0 h, dense SAE 1.5 h, Adam 0.38 h, temporaries 0.05 h; 3.9 h in all.
    mistral = study(
        saes={"widths": [131072]},
        train={"models": ["base"], "tokens": "800M"},
        norm_scale={"base": 11.58, "chat": 7.93},
    )
    cost = estimate(mistral, model_shape(MISTRAL))
    rate = 790e12 * 3600
    assert cost.training.lm_flops / rate == pytest.approx(2.0, abs=0.05)
    assert cost.training.sae_flops / rate == pytest.approx(1.5, abs=0.05)
    assert cost.training.traffic_bytes / (4.3e12 * 3600) == pytest.approx(0.38 + 0.05, abs=0.01)
    assert hours(cost, tflops=790, gbps=4300).training == pytest.approx(3.9, abs=0.1)
    assert cost.sae_params == {"standard-w131072-l1_3-s0": 2 * 4096 * 131072 + 131072 + 4096}


def test_memory_and_disk_are_those_worked_out_by_hand() -> None:
    small = study(
        layer=13,
        tokens={"dataset": "x", "context_size": 1024},
        saes={"widths": [8192], "seeds": [0, 1]},
        train={"tokens": "5M", "scale_tokens": "1M", "batch_size": 4096},
        finetune={"tokens": ["1M", "2M"], "control": True},
        evaluate={"tokens": 98304, "batch_size": 8},
    )
    cost = estimate(small, model_shape(QWEN))
    one_sae = 2 * 1024 * 8192 + 8192 + 1024
    layer = 4 * 1024**2 + 3 * 1024 + 3 * 1024 * 2816 + 2 * 1024
    assert cost.training_memory.lm == 2 * (151936 * 1024 + 13 * layer), "bfloat16, up to the site"
    assert cost.training_memory.saes == 2 * one_sae * 16
    assert cost.training_memory.buffer == 2**29 * 2
    assert cost.evaluation_memory.lm == 463_987_712 * 4, "float32, whole"
    n_sets = 2 + 2 * 2  # base, chat, and two budgets, each fine-tuned and from scratch
    assert cost.evaluation_memory.saes == cost.disk.saes == n_sets * 2 * one_sae * 4
    assert cost.disk.tokens == (5_000_000 + 98304) * 4, "the vocabulary needs 4 bytes"
    assert cost.disk.activations == 2 * 98304 * 1024 * 4
    assert cost.finetuning.sae_flops == 3_000_000 * 2 * 2 * (5 * 2 * 1024 * 8192)
    per_layer = 2 * layer + 2 * 1024 * 1024
    assert cost.training.lm_flops == 2 * 6_000_000 * 13 * per_layer
    on_cpu = estimate(small, model_shape(QWEN), gpu=False)
    assert on_cpu.training_memory.lm == 2 * cost.training_memory.lm
    assert cost.training_memory.total > cost.training_memory.saes
    assert cost.disk.total > cost.disk.saes


def test_a_site_after_a_layer_needs_that_layer() -> None:
    def lm_flops(hook: str) -> float:
        there = study(site={"layer": 13, "hook": hook}, saes={})
        return estimate(there, model_shape(QWEN)).training.lm_flops

    assert lm_flops("resid_post") == pytest.approx(lm_flops("resid_pre") * 14 / 13)
    assert lm_flops("resid_post") == lm_flops("attn_out")


def test_evaluation_runs_the_upper_layers_once_a_splice() -> None:
    shape = model_shape(QWEN)
    external = [{"name": "x", "trained_on": "base", "path": "p"}]
    one = estimate(study(layer=12, external_saes=external, evaluate={"outliers": ["kept"]}), shape)
    layer = 2 * shape.n_params_layer + 2 * 2048 * 1024
    # Up to the site once; from there clean, mean-ablated and spliced.
    assert one.evaluation.lm_flops == 2 * 98304 * (12 * layer + 3 * (12 * layer + 2 * 1024 * 151936))
    assert one.training.lm_flops == one.training_memory.total == 0
    assert one.sae_params == {}
    both = estimate(study(layer=12, external_saes=external), shape)
    assert both.evaluation.lm_flops == 2 * 98304 * (12 * layer + 5 * (12 * layer + 2 * 1024 * 151936))


def test_evaluation_runs_whole_passes_where_it_cannot_restart() -> None:
    shape = model_shape(QWEN)
    site = {"layer": 12, "hook": "mlp_out"}
    external = [{"name": "x", "trained_on": "base", "path": "p"}]
    cost = estimate(study(site=site, external_saes=external, evaluate={"outliers": ["kept"]}), shape)
    layer = 2 * shape.n_params_layer + 2 * 2048 * 1024
    assert cost.evaluation.lm_flops == 2 * 98304 * (13 * layer + 3 * (24 * layer + 2 * 1024 * 151936))


def test_a_study_without_saes_costs_no_training_and_no_evaluation() -> None:
    nothing = hours(estimate(study(), model_shape(QWEN)), tflops=100, gbps=1000)
    assert nothing.total == 0
