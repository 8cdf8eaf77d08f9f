"""Attention with repeated keys and values: the numbers of Hugging Face's, and a call that a fused kernel takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sae_transfer.models.attention import REPEATING, repeat_keys
from sae_transfer.models.pair import load_model, resolve
from sae_transfer.models.splice import LayerSplicer, open_splicer
from tests.checkpoints import make_checkpoint

N_HEADS = 4
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def load(directory: Path, device: str = "cpu") -> Any:
    return load_model(resolve(str(directory)), dtype="float32", device=device)


def tokens() -> torch.Tensor:
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", GROUPED)
def test_the_numbers_are_those_of_grouped_attention(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, repeating = (load(make_checkpoint(tmp_path / name, architecture)) for name in ("a", "b"))
    repeat_keys(repeating)
    calls: list[tuple[int, dict[str, Any]]] = []
    attend = functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        assert key.shape == value.shape
        calls.append((key.shape[1], options))
        return attend(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        expected = plain(tokens()).logits
        assert {n_heads for n_heads, _ in calls} == {2} and all(options["enable_gqa"] for _, options in calls)
        calls.clear()
        torch.testing.assert_close(repeating(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == 3
        for n_heads, options in calls:
            assert n_heads == N_HEADS and not options.get("enable_gqa")
            assert options["is_causal"] and options["attn_mask"] is None


@pytest.mark.parametrize("architecture", [*GROUPED, "gpt_neox", "gpt2"])
def test_padding_is_not_attended_to(architecture: str, tmp_path: Path) -> None:
    plain, repeating = (load(make_checkpoint(tmp_path / name, architecture)) for name in ("a", "b"))
    repeat_keys(repeating)
    padded, mask = tokens(), torch.ones(2, 24, dtype=torch.long)
    padded[1, :9], mask[1, :9] = 2, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    answers = repeating.generate(padded, **options)
    assert torch.equal(answers, plain.generate(padded, **options))
    alone = repeating.generate(padded[1:, 9:], **{**options, "attention_mask": mask[1:, 9:]})
    assert torch.equal(answers[1, 9:], alone[0])


def test_a_window_holds(tmp_path: Path) -> None:
    plain, repeating = (load(make_checkpoint(tmp_path / n, "mistral", sliding_window=7)) for n in ("a", "b"))
    repeat_keys(repeating)
    unlimited = load(make_checkpoint(tmp_path / "c", "mistral"))
    with torch.no_grad():
        expected = plain(tokens()).logits
        torch.testing.assert_close(repeating(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(unlimited(tokens()).logits, expected, atol=1e-2)


def test_a_model_cut_at_a_site_keeps_it(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "mistral")
    model = load(directory)
    repeat_keys(model)
    splicer = open_splicer(model, "blocks.1.hook_resid_pre", resolve(str(directory)))
    assert isinstance(splicer, LayerSplicer)
    assert splicer.difference is not None and splicer.difference < 1e-5
    assert model.config._attn_implementation == REPEATING


def test_a_model_whose_attention_is_another_is_left_as_it_is(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "m", "gemma2"))
    repeat_keys(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", GROUPED)
def test_on_a_gpu_float32_is_fused(architecture: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", architecture)
    with torch.no_grad():
        expected = load(directory)(tokens()).logits
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # any other would be an error
            found = load(directory, "cuda")(tokens().cuda()).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
