"""Checkpoints: found wherever they are, refused when damaged, compared as a pair."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae_transfer.errors import StudyError
from sae_transfer.models.pair import check_agreement, fingerprint, layers_to, load_model, load_tokenizer, resolve
from tests.checkpoints import make_checkpoint


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def copy_of(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to


def test_a_hub_id_is_found_in_a_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-org--Tiny-Llama"
    make_checkpoint(repository / "snapshots" / commit, "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = resolve("some-org/Tiny-Llama")
    assert (found.revision, found.model_class, found.d_model, found.n_layers) == (commit, "LlamaForCausalLM", 32, 3)
    assert load_model(found, dtype="float32", device="cpu").config.vocab_size == 300
    with pytest.raises(StudyError, match="not to be had from the hub"):
        resolve("some-org/Other")
    with pytest.raises(StudyError, match="at revision v2"):
        resolve("some-org/Tiny-Llama", "v2")


def test_the_embedded_pair_resolves_and_agrees() -> None:
    base, chat = resolve("demo:base"), resolve("demo:chat")
    assert (base.model_class, base.d_model, base.n_layers) == ("LlamaForCausalLM", 128, 4)
    assert all("vocabulary" not in note for note in check_agreement(base, chat))
    with pytest.raises(StudyError, match="demo:other"):
        resolve("demo:other")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    with pytest.raises(StudyError, match=r"no readable config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(StudyError, match="neither a directory nor a hub id"):
        resolve(str(tmp_path / "absent"))
    pickled = copy_of(llama_pair[0], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(StudyError, match=r"no \.safetensors file"):
        resolve(str(pickled))
    assert resolve(str(pickled), weights=False).d_model == 32


def test_too_little_memory_is_not_taken_for_a_damaged_file(
    llama_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(StudyError, match=r"base: out of memory .* \(Default.* can't allocate memory\)"):
        load_model(resolve(str(llama_pair[0])), dtype="float32", device="cpu")


def test_a_truncated_weight_file_is_refused(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    damaged = copy_of(llama_pair[0], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(StudyError, match="cannot be loaded"):
        load_model(resolve(str(damaged)), dtype="float32", device="cpu")


def test_missing_weights_are_refused_not_filled_with_random_ones(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    partial = copy_of(llama_pair[0], tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudyError, match=r"1 weights are missing or of the wrong shape.*layers\.1\.mlp\.up_proj"):
        load_model(resolve(str(partial)), dtype="float32", device="cpu")


@pytest.mark.parametrize("in_shards", [False, True])
def test_the_weights_of_layers_that_are_not_asked_for_need_not_be_there(tmp_path: Path, in_shards: bool) -> None:
    whole = make_checkpoint(tmp_path / "whole", "llama", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(whole)
    low = {key: value for key, value in model.state_dict().items() if "layers.2." not in key and "lm_head" not in key}
    model.save_pretrained(tmp_path / "low", state_dict=low, max_shard_size="20KB" if in_shards else "1GB")
    checkpoint = resolve(str(tmp_path / "low"))
    assert (len(list(checkpoint.directory.glob("*.safetensors"))) > 1) == in_shards
    cut = load_model(checkpoint, dtype="float32", device="cpu", layers=2)
    assert cut.state_dict().keys() == {*low, "lm_head.weight"}
    assert all(torch.equal(value, cut.state_dict()[key]) for key, value in low.items())
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    with pytest.raises(StudyError, match=r"9 weights are missing or of the wrong shape.*layers\.2\."):
        load_model(checkpoint, dtype="float32", device="cpu")


def test_a_missing_weight_below_the_cut_is_refused(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    partial = copy_of(llama_pair[0], tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    load_model(resolve(str(partial)), dtype="float32", device="cpu", layers=1)
    with pytest.raises(StudyError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        load_model(resolve(str(partial)), dtype="float32", device="cpu", layers=2)


def test_the_site_says_how_many_layers_run() -> None:
    assert layers_to("blocks.2.hook_resid_pre", 3) == 2
    assert {layers_to(f"blocks.2.hook_{hook}", 3) for hook in ("resid_mid", "resid_post", "attn_out", "mlp_out")} == {3}
    with pytest.raises(StudyError, match="beyond the model"):
        layers_to("blocks.3.hook_resid_pre", 3)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    damaged = copy_of(llama_pair[0], tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text('{"broken')
    with pytest.raises(StudyError, match="its tokenizer cannot be read"):
        load_tokenizer(resolve(str(damaged)))


def test_a_pair_that_differs_in_class_width_or_depth_is_refused_for_all_reasons_at_once(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", "llama")
    other = make_checkpoint(tmp_path / "other", "mistral", num_hidden_layers=2, hidden_size=64, head_dim=16)
    with pytest.raises(StudyError) as refusal:
        check_agreement(resolve(str(one)), resolve(str(other)))
    for reason in ("model class: 'LlamaForCausalLM' against 'MistralForCausalLM'", "d_model: 32", "layers: 3"):
        assert reason in str(refusal.value)


def test_token_ids_that_mean_different_tokens_are_refused(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    other = copy_of(llama_pair[1], tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="2 token ids mean different tokens"):
        check_agreement(resolve(str(llama_pair[0])), resolve(str(other)))


def test_differences_that_leave_activations_comparable_are_noted(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    other = copy_of(llama_pair[1], tmp_path / "other")
    edit_json(other / "config.json", eos_token_id=5, max_position_embeddings=64, sliding_window=32)
    edit_json(other / "tokenizer_config.json", eos_token="<|end|>")
    notes = check_agreement(resolve(str(llama_pair[0])), resolve(str(other)))
    assert {note.split(":")[0] for note in notes} == {
        "eos_token_id",
        "max_position_embeddings",
        "sliding_window",
        "eos_token",
    }
    assert check_agreement(resolve(str(llama_pair[0])), resolve(str(llama_pair[1]))) == []


def test_tokens_added_above_the_shared_ids_are_noted(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    other = copy_of(llama_pair[1], tmp_path / "other")
    tokenizer = load_tokenizer(resolve(str(other)))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    notes = check_agreement(resolve(str(llama_pair[0])), resolve(str(other)))
    assert notes == ["tokens in the vocabulary: base 300, chat 301"]


def test_the_fingerprint_follows_the_weights(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    moved = copy_of(llama_pair[0], tmp_path / "elsewhere")
    assert fingerprint(resolve(str(moved))) == fingerprint(resolve(str(llama_pair[0])))
    assert fingerprint(resolve(str(llama_pair[1]))) != fingerprint(resolve(str(llama_pair[0])))
