"""The estimate is free of torch, so it repeats some of the code's own constants: they must stay the same."""

from math import prod

from sae_transfer.cost import memory, work
from sae_transfer.models import losses, passes
from sae_transfer.saes import gradients, steps, stream


def test_what_is_counted_is_what_the_code_holds_at_once() -> None:
    assert memory.BLOCK_VALUES * 4 == stream.BLOCK_BYTES
    assert {"cpu": stream.CPU_PASS_TOKENS, "gpu": stream.SCALE_BATCH_TOKENS} == memory.PASS_TOKENS
    assert {"cpu": gradients.BLOCK_ELEMENTS["cpu"], "gpu": gradients.BLOCK_ELEMENTS["cuda"]} == memory.STEP_ELEMENTS
    assert {"cpu": steps.TOP_K_BELOW["cpu"], "gpu": steps.TOP_K_BELOW["cuda"]} == work.TOP_K_BELOW


def test_what_evaluation_is_said_to_hold_is_what_it_holds_at_once() -> None:
    assert {"cpu": passes.AT_ONCE["cpu"].tokens, "gpu": passes.AT_ONCE["cuda"].tokens} == memory.EVALUATED_TOKENS
    assert {"cpu": passes.AT_ONCE["cpu"].features, "gpu": passes.AT_ONCE["cuda"].features} == memory.EVALUATED_FEATURES
    assert {"cpu": prod(losses.TILE["cpu"]), "gpu": prod(losses.TILE["cuda"])} == memory.LOGITS
