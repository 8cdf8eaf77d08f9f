import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sae_transfer.analysis import weights
from sae_transfer.analysis.weights import by_kind, compare, compare_activations, compare_weights
from sae_transfer.errors import StudyError
from sae_transfer.models.pair import resolve
from tests.checkpoints import SIZES, make_chat_of, make_checkpoint

HEADS, HEAD_DIM = 4, 8


def compared(base: Path, chat: Path) -> Any:
    return compare_weights(resolve(str(base)), resolve(str(chat)), progress=lambda done, total: None)


def row_of(rows: Any, name: str, kind: str) -> Any:
    (row,) = rows[(rows["name"] == name) & (rows["kind"] == kind)].itertuples()
    return row


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def assert_row(row: Any, base: torch.Tensor, chat: torch.Tensor) -> None:
    x, y = base.detach().double().flatten(), chat.detach().double().flatten()
    assert row.n_parameters == len(x)
    assert row.norm_base == pytest.approx(x.norm().item(), rel=1e-12)
    assert row.norm_chat == pytest.approx(y.norm().item(), rel=1e-12)
    assert row.norm_difference == pytest.approx((y - x).norm().item(), rel=1e-12)
    assert row.relative_difference == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-12)
    assert row.cosine == pytest.approx(torch.cosine_similarity(x, y, dim=0).item(), rel=1e-12)


@pytest.mark.parametrize("architecture", SIZES)
def test_every_weight_has_a_kind_and_the_numbers_of_plain_torch(architecture: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", architecture)
    chat = make_chat_of(base, tmp_path / "chat")
    rows = compared(base, chat)
    ours, theirs = (dict(loaded(path).named_parameters()) for path in (base, chat))
    assert "other" not in set(rows["kind"])
    assert rows["n_parameters"].sum() == sum(p.numel() for p in ours.values())
    fused = ("query_key_value", "c_attn")
    for full, parameter in ours.items():
        name = full.split(".", 1)[1] if full != "lm_head.weight" else full
        if architecture == "gpt_neox":
            name = name.replace("lm_head", "embed_out")  # what transformers calls it on disk
        if not any(part in name for part in fused):
            (kind,) = rows.loc[rows["name"] == name, "kind"]
            assert_row(row_of(rows, name, kind), parameter, theirs[full])
            assert kind.endswith("_bias") == (name.endswith("bias"))
    for layer in range(3):
        kinds = set(rows.loc[rows["layer"] == layer, "kind"])
        assert {"q", "k", "v", "o", "mlp_in", "mlp_out", "norm"} <= kinds
        assert ("mlp_gate" in kinds) == (architecture not in ("gpt2", "gpt_neox"))


def test_gpt_neox_has_query_key_and_value_head_by_head(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gpt_neox")
    chat = make_chat_of(base, tmp_path / "chat")
    rows, models = compared(base, chat), [loaded(path) for path in (base, chat)]
    for suffix in ("weight", "bias"):
        fused = [getattr(m.gpt_neox.layers[1].attention.query_key_value, suffix) for m in models]
        for part, kind in enumerate("qkv"):
            split = [f.reshape(HEADS, 3, HEAD_DIM, -1)[:, part] for f in fused]
            kind = kind if suffix == "weight" else f"{kind}_bias"
            assert_row(row_of(rows, f"layers.1.attention.query_key_value.{suffix}", kind), split[0], split[1])


def test_gpt2_has_query_key_and_value_side_by_side_in_columns(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gpt2")
    chat = make_chat_of(base, tmp_path / "chat")
    rows, models = compared(base, chat), [loaded(path) for path in (base, chat)]
    for suffix in ("weight", "bias"):
        fused = [getattr(m.transformer.h[2].attn.c_attn, suffix) for m in models]
        for part, kind in enumerate("qkv"):
            split = [f[..., 32 * part : 32 * (part + 1)] for f in fused]
            kind = kind if suffix == "weight" else f"{kind}_bias"
            assert_row(row_of(rows, f"h.2.attn.c_attn.{suffix}", kind), split[0], split[1])


def test_phi3_has_smaller_keys_and_values_and_the_gate_above_up(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("phi3", vocab_size=50, intermediate_size=64, pad_token_id=0, **sizes)
    for side, seed in (("base", 0), ("chat", 1)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / side)
    rows = compared(tmp_path / "base", tmp_path / "chat")
    layers = [loaded(tmp_path / side).model.layers[0] for side in ("base", "chat")]
    for kind, part in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        split = [layer.self_attn.qkv_proj.weight[part] for layer in layers]
        assert_row(row_of(rows, "layers.0.self_attn.qkv_proj.weight", kind), split[0], split[1])
    for kind, part in (("mlp_gate", slice(0, 64)), ("mlp_in", slice(64, 128))):
        split = [layer.mlp.gate_up_proj.weight[part] for layer in layers]
        assert_row(row_of(rows, "layers.0.mlp.gate_up_proj.weight", kind), split[0], split[1])


def test_an_unembedding_has_a_row_only_where_it_is_not_tied(tmp_path: Path) -> None:
    sides = {}
    for side, tied in (("tied", True), ("untied", False)):
        base = make_checkpoint(tmp_path / side / "base", "llama", tie_word_embeddings=tied)
        sides[side] = base, make_chat_of(base, tmp_path / side / "chat")
    assert "unembedding" not in set(compared(*sides["tied"])["kind"])
    rows, models = compared(*sides["untied"]), [loaded(path) for path in sides["untied"]]
    assert_row(row_of(rows, "lm_head.weight", "unembedding"), models[0].lm_head.weight, models[1].lm_head.weight)
    rows = compared(sides["tied"][0], sides["untied"][1])
    embedding = loaded(sides["tied"][0]).model.embed_tokens.weight
    assert_row(row_of(rows, "lm_head.weight", "unembedding"), embedding, models[1].lm_head.weight)


def test_a_scaled_copy_differs_by_its_factor_and_has_cosine_one(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2")
    model = loaded(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(tmp_path / "chat")
    rows = compared(base, tmp_path / "chat")
    for table in (rows, by_kind(rows)):
        np.testing.assert_allclose(table["relative_difference"], 0.25, rtol=1e-7)
        np.testing.assert_allclose(table["cosine"], 1, rtol=1e-12)
        np.testing.assert_allclose(table["norm_chat"], 1.25 * table["norm_base"], rtol=1e-7)


def test_embeddings_are_compared_over_the_ids_that_both_sides_have(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    model = loaded(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(tmp_path / "chat")
    for rows in (compared(base, tmp_path / "chat"), compared(tmp_path / "chat", base)):
        for kind, name in (("embedding", "embed_tokens.weight"), ("unembedding", "lm_head.weight")):
            row = row_of(rows, name, kind)
            assert row.n_parameters == (model.config.vocab_size - 3) * 32
            assert row.relative_difference == 0


def test_shards_chunks_and_missing_prefixes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in ("gpt2", "gpt_neox"):
        base = make_checkpoint(tmp_path / architecture / "base", architecture)
        chat = make_chat_of(base, tmp_path / architecture / "chat")
        expected = compared(base, chat)
        sharded = tmp_path / architecture / "sharded"
        loaded(chat).save_pretrained(sharded, max_shard_size="50KB")
        assert len(list(sharded.glob("*.safetensors"))) > 2
        pd.testing.assert_frame_equal(compared(base, sharded), expected)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "CHUNK_VALUES", 100)  # three rows of most tensors, less than one of others
            pd.testing.assert_frame_equal(compared(base, chat), expected, rtol=1e-12)
    old = tmp_path / "old"
    tensors = {
        k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "gpt2/chat/model.safetensors").items()
    }
    old.mkdir()
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, old / "model.safetensors")
    (old / "config.json").write_text((tmp_path / "gpt2/chat/config.json").read_text())
    pd.testing.assert_frame_equal(
        compared(tmp_path / "gpt2/base", old), compared(*(tmp_path / "gpt2" / s for s in ("base", "chat")))
    )


def test_bfloat16_weights_are_compared_exactly(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    chat = make_chat_of(base, tmp_path / "chat")
    for path in (base, chat):
        loaded(path).to(torch.bfloat16).save_pretrained(path)
    rows, models = compared(base, chat), [loaded(path) for path in (base, chat)]
    pair = [m.model.layers[0].mlp.down_proj.weight for m in models]
    assert pair[0].dtype == torch.bfloat16
    assert_row(row_of(rows, "layers.0.mlp.down_proj.weight", "mlp_out"), pair[0], pair[1])


def test_rows_of_a_layer_and_kind_are_pooled_by_their_squares(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen3")
    chat = make_chat_of(base, tmp_path / "chat")
    rows = compared(base, chat)
    pooled: Any = by_kind(rows)
    assert not pooled.duplicated(["layer", "kind"]).any()
    assert pooled["n_parameters"].sum() == rows["n_parameters"].sum()
    norms = [m.model.layers[1] for m in (loaded(base), loaded(chat))]
    flat = [
        torch.cat([p.detach().flatten() for name, p in layer.named_parameters() if "norm" in name]) for layer in norms
    ]
    (row,) = pooled[(pooled["layer"] == 1) & (pooled["kind"] == "norm")].itertuples()
    assert_row(row, flat[0], flat[1])
    assert pooled["layer"].isna().sum() == 3  # embedding, last norm, unembedding


def test_rows_come_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", num_hidden_layers=11)
    rows = compared(base, base)
    assert rows["layer"].dropna().is_monotonic_increasing
    assert rows["name"].iloc[0] == "embed_tokens.weight"
    assert set(rows["name"].iloc[-2:]) == {"norm.weight", "lm_head.weight"}


def test_weights_that_are_zero_have_no_relative_difference(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gpt2")
    model = loaded(base)
    torch.nn.init.zeros_(model.transformer.h[0].attn.c_proj.bias)
    model.save_pretrained(tmp_path / "zero")
    row = row_of(compared(tmp_path / "zero", base), "h.0.attn.c_proj.bias", "o_bias")
    assert row.norm_base == 0 < row.norm_difference
    assert np.isnan(row.relative_difference) and np.isnan(row.cosine)


def test_different_or_damaged_weights_are_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    wider = make_checkpoint(tmp_path / "wider", "llama", intermediate_size=80)
    with pytest.raises(StudyError, match=r"mlp\.down_proj\.weight has the shape \[32, 64\].*\[32, 80\]"):
        compared(base, wider)
    cut = make_checkpoint(tmp_path / "cut", "llama")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(StudyError, match="cut: its weights cannot be read"):
        compared(base, cut)
    (cut / "model.safetensors").rename(cut / "elsewhere.safetensors")
    with pytest.raises(StudyError, match="cut: its weights cannot be read"):
        compared(base, cut)


def test_what_one_side_alone_has_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    biased = make_checkpoint(tmp_path / "biased", "llama", attention_bias=True)
    assert set(compared(base, biased)["name"]) == set(compared(base, base)["name"])
    assert "in one model's files only, not compared: layers.0.self_attn.k_proj.bias" in caplog.text


def random_acts(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(6, 5, 16)).astype(np.float32)


def test_activations_are_compared_position_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random_acts(0), (random_acts(0) + random_acts(1) / 4).astype(np.float32)
    outliers = np.zeros((6, 5), bool)
    outliers[:, 0] = True
    scales = {"base": 2.0, "chat": 0.5}
    found = compare_activations(x, y, norm_scales=scales, outliers=outliers)
    a, b = (torch.from_numpy(array).double() for array in (x, y))
    for policy, counted in (("kept", ~np.zeros_like(outliers)), ("excluded", ~outliers)):
        mask = torch.from_numpy(counted)
        assert found[policy].n_positions == int(mask.sum())
        for spread, values in (
            (found[policy].cosine, torch.cosine_similarity(a, b, dim=-1)),
            (found[policy].relative_distance, (b - a).norm(dim=-1) / a.norm(dim=-1)),
            (found[policy].relative_distance_scaled, (0.5 * b - 2 * a).norm(dim=-1) / (2 * a).norm(dim=-1)),
        ):
            chosen = values[mask]
            assert spread.mean == pytest.approx(chosen.mean().item(), rel=1e-12)
            quantiles = torch.quantile(chosen, torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64))
            assert [spread.median, spread.p5, spread.p95] == pytest.approx(quantiles.tolist(), rel=1e-12)
    monkeypatch.setattr(weights, "CHUNK_VALUES", 170)
    assert compare_activations(x, y, norm_scales=scales, outliers=outliers) == found


def test_scaling_undoes_a_common_factor_between_the_models() -> None:
    x = random_acts(0)
    found = compare_activations(
        x, (4 * x).astype(np.float32), norm_scales={"base": 1.0, "chat": 0.25}, outliers=np.ones((6, 5), bool)
    )
    assert found["kept"].relative_distance.mean == pytest.approx(3)
    assert found["kept"].relative_distance_scaled.mean == 0
    assert found["kept"].cosine.p5 == pytest.approx(1)
    assert set(found) == {"kept"}  # every position is an outlier: nothing to say without them


def test_a_zero_activation_is_not_counted() -> None:
    x = random_acts(0)
    x[0, 0] = 0
    found = compare_activations(x, x, norm_scales={"base": 1, "chat": 1}, outliers=np.zeros((6, 5), bool))
    assert found["kept"].n_positions == 29
    assert found["kept"].relative_distance.mean == 0


def test_the_stage_writes_rows_kinds_and_activations(tmp_path: Path) -> None:
    checkpoints = {side: resolve(f"demo:{side}") for side in ("base", "chat")}
    acts = {"base": random_acts(0), "chat": random_acts(1)}
    compare(
        tmp_path / "weights",
        checkpoints,
        acts,
        norm_scales={"base": 1.0, "chat": 1.0},
        outliers=np.zeros((6, 5), bool),
    )
    rows: Any = pd.read_csv(tmp_path / "weights/rows.csv")
    columns = "name layer kind n_parameters norm_base norm_chat norm_difference relative_difference cosine".split()
    assert list(rows.columns) == columns
    assert (rows["relative_difference"] > 0).all()
    assert list(pd.read_csv(tmp_path / "weights/by_kind.csv").columns) == columns[1:]
    told = json.loads((tmp_path / "weights/activations.json").read_text())
    assert set(told["excluded"]) == {"n_positions", "cosine", "relative_distance", "relative_distance_scaled"}
    assert set(told["kept"]["cosine"]) == {"mean", "median", "p5", "p95"}
