from typing import Any

import pytest

from sae_transfer.config import Study
from sae_transfer.cost.device import Device
from sae_transfer.cost.estimate import Cost, Stage, estimate
from sae_transfer.cost.memory import PASS_TOKENS, pass_values
from sae_transfer.cost.shape import model_shape
from sae_transfer.cost.work import Part
from sae_transfer.study_file import parse_study
from tests.cost.shapes import MISTRAL, QWEN

H200 = Device("h200", tflops=790, tflops_float32=54, gbps=4300, gib=141)
LAYER = 4 * 1024**2 + 3 * 1024 + 3 * 1024 * 2816 + 2 * 1024  # parameters of Qwen1.5-0.5B's


def study(layer: int = 16, **sections: Any) -> Study:
    required = {
        "pair": {"base": "a", "chat": "b"},
        "site": {"layer": layer, "hook": "resid_pre"},
        "tokens": {"dataset": "x"},
    }
    return parse_study({**required, **sections}, "study.yaml")


def stage(cost: Cost, name: str) -> Stage:
    found = cost.stage(name)
    assert found is not None
    return found


def part(cost: Cost, name: str, of: str) -> Part:
    return next(p for p in stage(cost, name).parts if p.name == of)


def test_mistral_on_one_h200_takes_the_hours_worked_out_on_paper() -> None:
    # 790 TFLOP/s and 4.3 TB/s: language model 2.0 h, dense SAE 1.5 h, Adam 0.38 h; to read the gradients for their norm
    # and to write them clipped takes a seventh of Adam's each.
    mistral = study(
        saes={"widths": [131072]},
        train={"models": ["base"], "tokens": "800M"},
        norm_scale={"base": 11.58, "chat": 7.93},
    )
    cost = estimate(mistral, model_shape(MISTRAL))
    rate = 790e12 * 3600
    assert part(cost, "training", "language model").flops / rate == pytest.approx(2.0, abs=0.05)
    assert part(cost, "training", "SAE steps").flops / rate == pytest.approx(1.5, abs=0.05)
    assert part(cost, "training", "Adam").seconds(H200) / 3600 == pytest.approx(0.38 * 9 / 7, abs=0.01)
    assert cost.sae_params == {"standard-w131072-l1_3-s0": 2 * 4096 * 131072 + 131072 + 4096}
    assert cost.hours(H200) == pytest.approx(sum(s.hours(H200) for s in cost.stages))


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
    training, tuning, evaluation = (stage(cost, n).memory for n in ("training", "fine-tuning", "evaluation"))
    one_sae = 2 * 1024 * 8192 + 8192 + 1024
    assert training.model == 2 * (151936 * 1024 + 13 * LAYER + 1024), "bfloat16, up to the site"
    assert training.saes == 2 * one_sae * 12 + (4 + 2) * one_sae, "one SAE at a time has gradients and autocast's copy"
    assert tuning.saes == 4 * one_sae * 12 + (4 + 2) * one_sae, "the controls are on the same stream"
    a_pass = PASS_TOKENS["gpu"] * pass_values(model_shape(QWEN)) * 2
    blocks = training.activations - a_pass
    assert 2 * 2**29 * 2 < blocks < 1.02 * 2 * 2**29 * 2 + 2**26, "two blocks in bfloat16, and their order"
    assert training.passes == 0, "beside the steps, not before them"
    assert evaluation.model == 463_987_712 * 4, "float32, whole"
    n_sets = 2 + 2 * 2  # base, chat, and two budgets, each fine-tuned and from scratch
    assert evaluation.saes == cost.disk.saes == n_sets * 2 * one_sae * 4
    assert cost.disk.tokens == (5_000_000 + 98304) * 4, "the vocabulary needs 4 bytes"
    assert cost.disk.activations == 2 * 98304 * 1024 * 4
    assert cost.disk.checkpoints == 2 * 2 * 2 * one_sae * 12, "two of each SAE on the widest stream"
    assert part(cost, "fine-tuning", "SAE steps").flops == 3_000_000 * 2 * 2 * (5 * 2 * 1024 * 8192)
    assert part(cost, "training", "language model").flops == 2 * 6_000_000 * 13 * (2 * LAYER + 2 * 1024 * 1024)
    on_cpu = estimate(small, model_shape(QWEN), gpu=False)
    assert stage(on_cpu, "training").memory.model == 2 * training.model
    assert training.total == pytest.approx(
        training.libraries
        + training.model
        + training.saes
        + training.activations
        + max(training.passes, training.features)
    )


def test_gradients_are_of_one_sae_on_a_gpu_and_of_all_that_are_made_by_hand_on_a_cpu() -> None:
    saes = [{"widths": [1024]}, {"architecture": "gated", "widths": [1024, 2048]}]
    some = study(saes=saes, compute={"autocast": "float32"})

    def on(gpu: bool) -> float:
        return stage(estimate(some, model_shape(QWEN), gpu=gpu), "training").memory.saes

    standard, *gated = estimate(some, model_shape(QWEN)).sae_params.values()
    assert on(gpu=True) == 12 * (standard + sum(gated)) + 4 * max(gated)
    assert on(gpu=False) == on(gpu=True) + 4 * standard


def test_scores_count_where_attention_is_not_fused() -> None:
    def a_pass(hook: str, **changes: Any) -> float:
        there = study(site={"layer": 13, "hook": hook}, saes={}, tokens={"dataset": "x", "context_size": 1024})
        return stage(estimate(there, model_shape({**QWEN, **changes})), "evaluation").memory.passes

    scores = 11 * 16 * 1024 * PASS_TOKENS["gpu"]
    fused = a_pass("resid_pre")
    assert a_pass("attn_out") == a_pass("resid_pre", model_type="gemma2") == fused + scores
    assert a_pass("resid_post") == fused


def test_dead_features_cost_memory_once_there_can_be_any() -> None:
    def features(tokens: str, k: int) -> float:
        topk = study(saes={"architecture": "topk", "widths": [131072], "k": [k]}, train={"tokens": tokens})
        return stage(estimate(topk, model_shape(MISTRAL)), "training").memory.features

    assert features("40M", 32) - features("4M", 32) == 4 * 65536 * (4 * 4096 + 3 * 4096)
    assert features("40M", 1024) - features("4M", 1024) == 4 * 4 * 4096 * 131072, "by autograd"


def test_training_memory_does_not_grow_with_tokens_once_a_block_is_full() -> None:
    def memory(tokens: str) -> float:
        return stage(estimate(study(saes={}, train={"tokens": tokens}), model_shape(QWEN)), "training").memory.total

    assert memory("10M") == memory("800M") > memory("100k")


def test_precision_decides_rates_and_sizes() -> None:
    def parts(gpu: bool, **sections: Any) -> dict[str, str]:
        cost = estimate(study(saes={}, **sections), model_shape(QWEN), gpu=gpu)
        return {f"{s.name}: {p.name}": p.precision for s in cost.stages for p in s.parts}

    assert parts(gpu=True)["training: language model"] == parts(gpu=True)["training: SAE steps"] == "bfloat16"
    assert parts(gpu=True)["evaluation: language model"] == "float32"
    assert parts(gpu=True, compute={"autocast": "float32"})["training: SAE steps"] == "tf32"
    assert set(parts(gpu=False).values()) == {"float32"}
    assert H200.rates == {"bfloat16": 790e12, "tf32": 395e12, "float32": 54e12}


def test_a_site_after_a_layer_needs_that_layer() -> None:
    def flops(hook: str) -> float:
        there = study(site={"layer": 13, "hook": hook}, saes={})
        return part(estimate(there, model_shape(QWEN)), "training", "language model").flops

    assert flops("resid_post") == pytest.approx(flops("resid_pre") * 14 / 13)
    assert flops("resid_post") == flops("attn_out")


def test_evaluation_runs_the_upper_layers_once_a_splice() -> None:
    shape = model_shape(QWEN)
    external = [{"name": "x", "trained_on": "base", "path": "p"}]
    layer, head = 2 * LAYER + 2 * 2048 * 1024, 2 * 1024 * 151936
    one = estimate(study(layer=12, external_saes=external, evaluate={"outliers": ["kept"]}), shape)
    # Up to the site once; from there clean, with another product for the KL, and spliced.
    assert part(one, "evaluation", "language model").flops == 2 * 98304 * (24 * layer + 2 * head + 12 * layer + head)
    assert one.stage("training") is None and one.sae_params == {}
    both = estimate(study(layer=12, external_saes=external), shape)
    more = part(both, "evaluation", "language model").flops - part(one, "evaluation", "language model").flops
    assert more == 2 * 98304 * (12 * layer + head)


def test_evaluation_runs_whole_passes_and_every_ablation_where_it_cannot_restart() -> None:
    site = {"layer": 12, "hook": "mlp_out"}
    external = [{"name": "x", "trained_on": "base", "path": "p"}]
    cost = estimate(study(site=site, external_saes=external, evaluate={"outliers": ["kept"]}), model_shape(QWEN))
    layer, head = 2 * LAYER + 2 * 2048 * 1024, 2 * 1024 * 151936
    # clean, one splice, zeros and the mean
    expected = 2 * 98304 * (13 * layer + 4 * 24 * layer + 5 * head)
    assert part(cost, "evaluation", "language model").flops == expected


def test_few_active_features_of_a_topk_sae_cost_one_product() -> None:
    def flops(k: int) -> float:
        topk = study(saes={"architecture": "topk", "widths": [131072], "k": [k]}, train={"models": ["base"]})
        return part(estimate(topk, model_shape(MISTRAL)), "training", "SAE steps").flops

    assert flops(32) == 400_000_000 * (2 * 4096 * 131072 + 4 * 2 * 4096 * 32)
    assert flops(4096) == 400_000_000 * 5 * 2 * 4096 * 131072


def test_a_study_without_saes_costs_no_training_and_no_evaluation() -> None:
    nothing = estimate(study(), model_shape(QWEN))
    assert nothing.stages == () and nothing.hours(H200) == 0
