"""Steps worked out by hand: the losses, gradients and counts of SAELens's forward pass and autograd."""

import json
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.profiler import ProfilerActivity, profile

from sae_transfer.saes import gradients, steps
from sae_transfer.saes.steps import Outcome, by_hand, standard_step, topk_step
from tests.saes.saes import random_training_sae

L1 = 3.0
CPU = torch.device("cpu")


def shaken(sae: Any, enc_bias: float = 0.0) -> Any:
    """The SAE with something random in every parameter, and the encoder bias shifted: that sets L0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        sae.b_enc += enc_bias
    return sae


def standard(d_in: int = 24, d_sae: int = 200, enc_bias: float = 0.0, **options: Any) -> StandardTrainingSAE:
    torch.manual_seed(0)
    config = StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1, **options)
    return shaken(StandardTrainingSAE(config), enc_bias)


def topk(architecture: str, k: int = 4, **options: Any) -> TopKTrainingSAE:
    torch.manual_seed(0)
    if architecture == "topk":
        return shaken(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=24, d_sae=200, k=k, **options)))
    return shaken(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=24, d_sae=200, k=k, **options)))


def inputs(n_rows: int = 300, d_in: int = 24) -> torch.Tensor:
    return torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(2))


def grads(sae: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.cpu().clone() for name, parameter in sae.named_parameters()}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference as a fraction of the expected norm; 0 where both are zero."""
    difference = (found - expected).norm().item()
    return difference and difference / expected.norm().item()


def by_autograd(sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None) -> TrainStepOutput:
    """SAELens's losses, with gradients in place."""
    sae.zero_grad()
    output = sae.training_forward_pass(TrainStepInput(x, {"l1": L1}, dead, 0, False))
    output.loss.backward()
    return output


def assert_same(sae: Any, x: torch.Tensor, outcome: Outcome, dead: torch.Tensor | None = None) -> None:
    """The outcome and the gradients in place are SAELens's, gradients to 1e-5 of their norm."""
    found = grads(sae)
    expected = by_autograd(sae, x, dead)
    for name, grad in grads(sae).items():
        assert off(found[name], grad) <= 1e-5, name
    assert set(outcome.losses) == set(expected.losses)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(outcome.losses[name], loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(outcome.sae_out, expected.sae_out.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(outcome.counts, (expected.feature_acts > 0).sum(0).float())


@pytest.fixture(params=["sparse", "dense", "by the number of active features"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way a standard step goes, whatever L0 is, or as it chooses itself."""
    if request.param != "by the number of active features":
        monkeypatch.setitem(steps.SPARSE_BELOW, "cpu", 1.0 if request.param == "sparse" else -1.0)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("enc_bias", [-9.0, -1.2, -0.6, 0.5])  # L0 0, 2, 23, 168 of 200
def test_a_standard_step_is_saelens_at_any_l0(enc_bias: float, apply_b_dec_to_input: bool) -> None:
    sae = standard(enc_bias=enc_bias, apply_b_dec_to_input=apply_b_dec_to_input)
    assert_same(sae, inputs(), standard_step(sae, inputs(), L1, torch.float32))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("d_in", "d_sae", "n_rows"), [(7, 5, 3), (64, 1000, 513), (33, 4099, 70), (8, 16, 1)])
def test_a_standard_step_is_saelens_in_any_shape(d_in: int, d_sae: int, n_rows: int) -> None:
    sae, x = standard(d_in, d_sae, enc_bias=-0.5), inputs(n_rows, d_in)
    assert_same(sae, x, standard_step(sae, x, L1, torch.float32))


def test_rows_without_an_active_feature_are_reconstructed_by_the_bias() -> None:
    sae, x = standard(enc_bias=-0.6, apply_b_dec_to_input=False), inputs()
    x[::2] = 0.0
    with torch.no_grad():
        sae.b_enc.clamp_(max=-0.1)
    outcome = standard_step(sae, x, L1, torch.float32)
    assert torch.equal(outcome.sae_out[::2], sae.b_dec.detach().expand(150, -1))
    assert_same(sae, x, outcome)


@pytest.mark.parametrize(("most_kept", "times_summed"), [(1, 3), (400, 2), (12800, 1)])  # about 300 active in a block
def test_sparse_and_dense_blocks_of_one_batch_add_up(
    most_kept: int, times_summed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gradients.BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(gradients, "BLOCK_ROWS", 64)
    monkeypatch.setattr(gradients, "ELEMENTS_A_KEPT_FEATURE", 64 * 200 // most_kept)
    taken = []
    for name in ("add_sparse", "add_dense", "_add_kept"):
        method = getattr(gradients.Gradients, name)
        monkeypatch.setattr(
            gradients.Gradients, name, lambda self, *a, m=method, n=name: (taken.append(n), m(self, *a))[1]
        )
    sae, x = standard(enc_bias=-1.0), inputs()
    x[64:128] *= 4.0
    x[256:] *= 4.0
    outcome = standard_step(sae, x, L1, torch.float32)
    ways = [name for name in taken if name != "_add_kept"]
    assert ways == ["add_sparse", "add_dense", "add_sparse", "add_sparse", "add_dense"]
    assert taken.count("_add_kept") == times_summed
    assert_same(sae, x, outcome)
    expected = grads(sae)
    standard_step(sae, x, L1, torch.bfloat16)
    for name, grad in grads(sae).items():
        assert off(grad, expected[name]) < 0.05, name


def most_bytes_held(run: Callable[[], object], trace: Path) -> int:
    """The most that tensors made in a call take at once; resident memory holds the allocator's accidents as well."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    before, *totals = [event["args"]["Total Allocated"] for event in sorted(events, key=itemgetter("ts"))]
    return max(totals) - before


@pytest.mark.parametrize(
    ("d_in", "d_sae", "n_rows", "share", "at_most"),
    # few are active, as late in training; and about as many as a sparse step takes, of a batch of many blocks, with
    # most of one block's or none of them kept beside the next
    [
        (128, 2048, 512, 0.005, 0.85),
        (256, 4096, 512, 0.005, 0.85),
        (256, 4096, 2048, 0.062, 1.0),
        (256, 4096, 2048, 0.068, 1.0),
    ],
)
def test_a_sparse_step_takes_less_memory_than_a_dense_one(
    d_in: int, d_sae: int, n_rows: int, share: float, at_most: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert share < steps.SPARSE_BELOW["cpu"]
    sae, x = standard(d_in, d_sae), inputs(n_rows, d_in)
    with torch.no_grad():
        pre_acts = (x @ sae.W_enc).flatten()
        sae.b_enc.fill_(-pre_acts.kthvalue(int((1 - share) * len(pre_acts))).values)
    held = {}
    for way, below in (("sparse", 1.0), ("dense", -1.0)):
        monkeypatch.setitem(steps.SPARSE_BELOW, "cpu", below)
        sae.zero_grad()
        n_active = standard_step(sae, x, L1, torch.float32).counts.sum().item()
        assert n_active == pytest.approx(share * len(pre_acts), rel=0.1)
        sae.zero_grad()  # they are a step's memory on both ways
        held[way] = most_bytes_held(lambda: standard_step(sae, x, L1, torch.float32), tmp_path / "trace.json")
    assert held["sparse"] < at_most * held["dense"]


@pytest.mark.usefixtures("way")
def test_a_feature_without_a_direction_has_no_gradient_of_its_norm() -> None:
    sae = standard(enc_bias=-0.5)
    with torch.no_grad():
        sae.W_dec[::3] = 0.0
    assert_same(sae, inputs(), standard_step(sae, inputs(), L1, torch.float32))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_topk_step_is_saelens(architecture: str, apply_b_dec_to_input: bool, rescaled: bool) -> None:
    options = {"apply_b_dec_to_input": apply_b_dec_to_input, "rescale_acts_by_decoder_norm": rescaled}
    sae, none = topk(architecture, **options), torch.zeros(200, dtype=torch.bool)
    assert_same(sae, inputs(), topk_step(sae, inputs(), none, torch.float32), none)


@pytest.mark.parametrize("n_dead", [5, 60])  # fewer and more than half of d_model
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_auxiliary_loss_of_dead_features_is_saelens(architecture: str, rescaled: bool, n_dead: int) -> None:
    sae, dead = topk(architecture, rescale_acts_by_decoder_norm=rescaled), torch.arange(200) % 3 == 0
    dead &= torch.arange(200) < 3 * n_dead
    outcome = topk_step(sae, inputs(), dead, torch.float32)
    assert outcome.losses["auxiliary_reconstruction_loss"] > 0
    assert_same(sae, inputs(), outcome, dead)


def test_top_features_below_zero_are_not_active() -> None:
    sae, none = topk("topk", k=10), torch.zeros(200, dtype=torch.bool)
    with torch.no_grad():
        sae.get_parameter("b_enc").sub_(1.5)
    outcome = topk_step(sae, inputs(), none, torch.float32)
    assert 0 < outcome.counts.sum() < 10 * 300
    assert_same(sae, inputs(), outcome, none)


def test_the_threshold_of_batchtopk_moves_as_in_saelens() -> None:
    ours, theirs = topk("batchtopk"), topk("batchtopk")
    none = torch.zeros(200, dtype=torch.bool)
    for _ in range(3):
        topk_step(ours, inputs(), none, torch.float32)
        by_autograd(theirs, inputs(), none)
    torch.testing.assert_close(ours.get_buffer("topk_threshold"), theirs.get_buffer("topk_threshold"))


@pytest.mark.parametrize("enc_bias", [-1.2, 0.5])
def test_bfloat16_is_about_as_near_to_float32_as_saelens_autocast(enc_bias: float) -> None:
    sae = standard(enc_bias=enc_bias)
    standard_step(sae, inputs(), L1, torch.bfloat16)
    ours = grads(sae)
    with torch.autocast("cpu", torch.bfloat16):
        by_autograd(sae, inputs())
    theirs = grads(sae)
    by_autograd(sae, inputs())
    for name, grad in grads(sae).items():
        assert off(ours[name], grad) < 1.5 * off(theirs[name], grad), name


def test_other_saes_keep_saelens_step() -> None:
    assert by_hand(standard(), CPU)
    assert by_hand(topk("batchtopk"), CPU)
    assert not by_hand(topk("topk", k=30), CPU)
    assert not by_hand(standard(lp_norm=2.0), CPU)
    assert not by_hand(standard(normalize_activations="layer_norm"), CPU)
    for architecture in ("gated", "jumprelu"):
        assert not by_hand(random_training_sae(architecture), CPU)


@pytest.mark.parametrize("below", [-1.0, 1.0])
def test_on_a_gpu_the_gradients_are_those_of_the_cpu(below: float, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.SPARSE_BELOW, "cuda", below)
    # several blocks of the batch and strips of features
    monkeypatch.setattr(gradients, "BLOCK_ROWS", 64)
    monkeypatch.setitem(gradients.BLOCK_ELEMENTS, "cuda", 1)
    monkeypatch.setitem(gradients.STRIP_ELEMENTS, "cuda", 1)
    monkeypatch.setattr(gradients, "ELEMENTS_A_KEPT_FEATURE", 64 * 200)
    for sae, step in (
        (standard(enc_bias=-0.6), lambda sae, x: standard_step(sae, x, L1, torch.float32)),
        (topk("batchtopk"), lambda sae, x: topk_step(sae, x, torch.arange(200, device=x.device) < 50, torch.float32)),
    ):
        step(sae, inputs())
        expected = grads(sae)
        sae.zero_grad()
        sae.to(gpu)
        step(sae, inputs().to(gpu))
        for name, grad in grads(sae).items():
            assert off(grad, expected[name]) <= 1e-5, name
