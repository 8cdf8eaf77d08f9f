"""Splicing: by restart and by hook, on every architecture and hook point."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_transfer.errors import StudyError
from sae_transfer.models.pair import Checkpoint, layers_to, load_model, resolve
from sae_transfer.models.splice import BridgeSplicer, LayerSplicer, Splicer, disagreement, open_splicer
from tests.checkpoints import SIZES, make_checkpoint

HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
LACKING = {("gpt_neox", "resid_mid")}  # attention and MLP in parallel


@pytest.fixture(scope="module", params=list(SIZES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Each architecture, in a directory whose name speaks of another one."""
    directory = tmp_path_factory.mktemp("models") / "a llama, or gpt2 perhaps"
    return request.param, make_checkpoint(directory, request.param)


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def checkpoint_at(directory: Path) -> Checkpoint:
    return resolve(str(directory))


def some_tokens(n: int = 24) -> torch.Tensor:
    return torch.randint(3, 250, (2, n), generator=torch.Generator().manual_seed(1))


def logits(splicer: Splicer, tokens: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
    return splicer.head.logits(splicer.run_on(tokens, acts).flatten(0, 1))


def test_every_hook_point_gives_hugging_face_logits_when_nothing_is_edited(checkpoint: tuple[str, Path]) -> None:
    architecture, directory = checkpoint
    model, tokens = load(directory), some_tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.flatten(0, 1)
    for hook in HOOKS:
        if (architecture, hook) in LACKING:
            continue
        splicer = open_splicer(model, f"blocks.1.hook_{hook}", checkpoint_at(directory))
        torch.testing.assert_close(logits(splicer, tokens, splicer.run_to(tokens)), expected, atol=5e-6, rtol=1e-5)


def test_a_hook_point_that_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "gpt_neox")
    with pytest.raises(StudyError, match=r"GPTNeoXForCausalLM has no blocks\.1\.hook_resid_mid"):
        open_splicer(load(directory), "blocks.1.hook_resid_mid", checkpoint_at(directory))


def test_a_model_that_does_more_to_its_logits_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")  # for its tokenizer
    config = AutoConfig.for_model("granite", **SIZES["llama"], vocab_size=200, logits_scaling=8.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = resolve(str(tmp_path))
    model = load_model(checkpoint, dtype="float32", device="cpu")
    with pytest.raises(StudyError, match="logits of GraniteForCausalLM are not the unembedding"):
        open_splicer(model, "blocks.1.hook_resid_pre", checkpoint)


def test_a_layer_beyond_the_model_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama")
    with pytest.raises(StudyError, match=r"site\.layer: 3 is beyond the model, whose layers are 0 to 2"):
        open_splicer(load(directory), "blocks.3.hook_resid_pre", checkpoint_at(directory))


@pytest.mark.parametrize("hook", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_splicing_by_restart_equals_splicing_by_hook(checkpoint: tuple[str, Path], hook: str, layer: int) -> None:
    _, directory = checkpoint
    model, tokens = load(directory), some_tokens()
    fast = open_splicer(model, f"blocks.{layer}.hook_{hook}", checkpoint_at(directory))
    assert isinstance(fast, LayerSplicer)
    reference = BridgeSplicer(model, f"blocks.{layer}.hook_{hook}", directory)
    acts = reference.run_to(tokens)
    assert (fast.run_to(tokens) - acts).abs().max() < 1e-6 * acts.abs().max()
    edited = acts * 0.5 + acts.roll(1, 1)
    ours, theirs = logits(fast, tokens, edited), logits(reference, tokens, edited)
    assert (ours - theirs).abs().max() < 1e-6 * max(10.0, theirs.abs().max().item())
    targets = tokens.flatten().roll(-1)
    losses = [torch.nn.functional.cross_entropy(z.double(), targets).item() for z in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_site_is_the_residual_stream_of_hugging_face(checkpoint: tuple[str, Path]) -> None:
    _, directory = checkpoint
    model, tokens = load(directory), some_tokens()
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        splicer = open_splicer(model, f"blocks.{layer}.hook_resid_pre", checkpoint_at(directory))
        torch.testing.assert_close(splicer.run_to(tokens), hidden[layer], atol=0, rtol=0)


def test_hook_points_of_a_block_add_up(checkpoint: tuple[str, Path]) -> None:
    architecture, directory = checkpoint
    if architecture == "gpt_neox":
        pytest.skip("a parallel block has no resid_mid")
    model, tokens = load(directory), some_tokens()
    at = {hook: open_splicer(model, f"blocks.1.hook_{hook}", checkpoint_at(directory)).run_to(tokens) for hook in HOOKS}
    torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at["resid_mid"] + at["mlp_out"], at["resid_post"], atol=1e-5, rtol=1e-5)


def test_an_edit_replaces_all_that_passes_the_hook_point(checkpoint: tuple[str, Path]) -> None:
    architecture, directory = checkpoint
    model, tokens = load(directory), some_tokens()
    for hook in HOOKS:
        if (architecture, hook) in LACKING:
            continue
        name = f"blocks.1.hook_{hook}"
        site, after = BridgeSplicer(model, name, directory), BridgeSplicer(model, "blocks.1.hook_resid_post", directory)
        edited = site.run_to(tokens).flip(1) * 0.5
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            hooks = [
                *site._edit(edited),
                ("blocks.1.hook_resid_post", lambda x, hook, seen=seen: seen.append(x.clone())),
            ]
            site._bridge.run_with_hooks(tokens, fwd_hooks=hooks)
            hooks = [*site._edit(edited), ("blocks.1.hook_mlp_out", lambda x, hook, seen=seen: seen.append(x.clone()))]
            site._bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        clean = {
            h: BridgeSplicer(model, f"blocks.1.hook_{h}", directory).run_to(tokens) for h in ("resid_pre", "attn_out")
        }
        resid_post, mlp_out = seen
        if hook == "resid_mid":
            torch.testing.assert_close(resid_post, edited + mlp_out, atol=1e-5, rtol=1e-5)
        elif hook == "attn_out":
            torch.testing.assert_close(resid_post, clean["resid_pre"] + edited + mlp_out, atol=1e-5, rtol=1e-5)
        elif hook == "mlp_out":
            torch.testing.assert_close(
                resid_post, clean["resid_pre"] + clean["attn_out"] + edited, atol=1e-5, rtol=1e-5
            )
        elif hook == "resid_post":
            torch.testing.assert_close(resid_post, edited)
            assert not torch.equal(edited, after.run_to(tokens))


def test_a_model_loaded_up_to_the_site_gives_the_same_activations(checkpoint: tuple[str, Path]) -> None:
    architecture, directory = checkpoint
    model, tokens, found = load(directory), some_tokens(), checkpoint_at(directory)
    for layer, hook in [*((1, hook) for hook in HOOKS), (0, "resid_pre"), (2, "resid_post")]:
        if (architecture, hook) in LACKING:
            continue
        name = f"blocks.{layer}.hook_{hook}"
        layers = layers_to(name, found.n_layers)
        low = load_model(found, dtype="float32", device="cpu", layers=layers)
        assert len(getattr(low.base_model, "layers", getattr(low.base_model, "h", ()))) == layers
        cut, whole = (open_splicer(m, name, found) for m in (low, model))
        torch.testing.assert_close(cut.run_to(tokens), whole.run_to(tokens), atol=0, rtol=0)
        assert cut.restarts == whole.restarts == (hook in ("resid_pre", "resid_post"))
        assert (cut.difference is not None) == cut.restarts
        assert cut.difference is None or cut.difference < 2e-6


SLIDING = {"sliding_window": 8}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mistral", SLIDING),
        ("gemma2", SLIDING),
        ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_longer_contexts_keep_the_sliding_window(
    tmp_path: Path, architecture: str, overrides: dict[str, Any], dtype: str
) -> None:
    found = checkpoint_at(make_checkpoint(tmp_path / "m", architecture, **overrides))
    tokens = some_tokens(40)
    model = load_model(found, dtype=dtype, device="cpu")
    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True)
        model.config.sliding_window, window = 4096, model.config.sliding_window
        assert not torch.equal(model(input_ids=tokens).logits, expected.logits)  # so the window is felt
        model.config.sliding_window = window
    splicer = open_splicer(model, "blocks.2.hook_resid_pre", found)
    assert splicer.restarts
    torch.testing.assert_close(splicer.run_to(tokens), expected.hidden_states[2], atol=0, rtol=0)
    atol, rtol = (1e-5, 1e-5) if dtype == "float32" else (0.5, 2e-2)
    ours = logits(splicer, tokens, splicer.run_to(tokens))
    torch.testing.assert_close(ours, expected.logits.flatten(0, 1).float(), atol=atol, rtol=rtol)
    low = open_splicer(load_model(found, dtype=dtype, device="cpu", layers=2), "blocks.2.hook_resid_pre", found)
    torch.testing.assert_close(low.run_to(tokens), expected.hidden_states[2], atol=0, rtol=0)


def test_whole_passes_end_at_the_site(checkpoint: tuple[str, Path]) -> None:
    _, directory = checkpoint
    splicer = BridgeSplicer(load(directory), "blocks.1.hook_attn_out", directory)
    ran: list[str] = []
    for name in ("blocks.1.hook_out", "unembed.hook_in"):
        splicer._bridge.hook_dict[name].add_hook(lambda x, hook: ran.append(hook.name))
    expected = splicer.run_to(some_tokens())
    assert ran == []
    splicer.run_on(some_tokens(), expected)
    assert len(ran) == 2
    assert torch.equal(splicer.run_to(some_tokens()), expected)  # a pass that was ended leaves nothing behind


def test_a_restart_that_differs_from_the_reference_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama")
    model = load(directory)
    honest = LayerSplicer.run_on
    monkeypatch.setattr(LayerSplicer, "run_on", lambda self, tokens, acts: honest(self, tokens, acts * 1.01))
    splicer = open_splicer(model, "blocks.1.hook_resid_pre", checkpoint_at(directory))
    assert isinstance(splicer, BridgeSplicer)
    assert "differs from TransformerLens" in caplog.text
    assert splicer.difference == disagreement(LayerSplicer(model, 1), splicer, model) > 1e-3


def test_opening_a_splicer_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "gpt2")
    model, tokens = load(directory), some_tokens()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        splicer = open_splicer(model, "blocks.1.hook_resid_pre", checkpoint_at(directory))
        splicer.run_on(tokens, splicer.run_to(tokens))
        assert torch.equal(model(input_ids=tokens).logits, before)
