import re
from dataclasses import replace

from sae_transfer.config import Study
from sae_transfer.cost.device import Device, find_device
from sae_transfer.cost.estimate import Stage, estimate
from sae_transfer.cost.fit import fits, proposals
from sae_transfer.cost.shape import model_shape
from tests.cost.shapes import MISTRAL, QWEN
from tests.cost.test_estimate import stage, study

SHAPE = model_shape(QWEN)


def with_memory(gib: float) -> Device:
    return replace(find_device("rtx3090"), gib=gib)


def test_a_batch_that_is_proposed_fits_and_twice_it_does_not() -> None:
    def training(batch_size: int) -> tuple[Study, Stage]:
        gated = {"architecture": "gated", "widths": [32768]}  # whose step is autograd's, [batch d_sae] many times over
        wide = study(saes=gated, train={"batch_size": batch_size})
        return wide, stage(estimate(wide, SHAPE), "training")

    asked, needs = training(4096)
    device = with_memory(10)
    assert not fits(needs, device)
    found = next(p for p in proposals(asked, SHAPE, needs, device, gpu=True) if p.startswith("train.batch_size"))
    proposed = int(re.findall(r"\d+", found)[0])
    assert fits(training(proposed)[1], device) and not fits(training(2 * proposed)[1], device)


def test_saes_are_proposed_for_studies_of_their_own_as_few_as_fit() -> None:
    widths = [8192, 16384, 32768, 65536]
    several = study(saes={"widths": widths})
    needs = stage(estimate(several, SHAPE), "training")
    device = with_memory(9)
    found = next(p for p in proposals(several, SHAPE, needs, device, gpu=True) if p.startswith("saes in"))
    assert "in 2 studies" in found and all(f"w{width}-" in found for width in widths)
    groups = [[int(w) for w in re.findall(r"-w(\d+)-", group)] for group in found.split(";")]
    for group in groups:
        assert fits(stage(estimate(study(saes={"widths": group}), SHAPE), "training"), device)


def test_the_smallest_gpu_that_suffices_is_named_where_nothing_else_helps() -> None:
    shape = model_shape(MISTRAL)
    mistral = study(saes={"widths": [131072]})
    training = stage(estimate(mistral, shape), "training")
    assert list(proposals(mistral, shape, training, find_device("rtx4090"), gpu=True)) == ["a GPU of 40 GiB (a100-40)"]


def test_a_model_too_large_in_float32_is_proposed_in_bfloat16() -> None:
    shape = model_shape(MISTRAL)
    mistral = study(saes={"widths": [16384]}, evaluate={"batch_size": 1})
    evaluation = stage(estimate(mistral, shape), "evaluation")
    assert "pair.dtype: bfloat16" in " ".join(proposals(mistral, shape, evaluation, find_device("l4"), gpu=True))


def test_nothing_is_proposed_for_a_cpu_that_cannot_hold_the_model() -> None:
    shape = model_shape(MISTRAL)
    mistral = study(saes={"widths": [131072]}, evaluate={"batch_size": 1})
    evaluation = stage(estimate(mistral, shape, gpu=False), "evaluation")
    assert list(proposals(mistral, shape, evaluation, with_memory(8), gpu=False)) == []
