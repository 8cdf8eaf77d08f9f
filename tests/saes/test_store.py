"""SAEs on disk: folding, loading by SAELens alone, refusals."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from sae_transfer.errors import StudyError
from sae_transfer.saes.store import check_fits, load_external, load_own, same_site_name, save_trained
from tests.saes.saes import ARCHITECTURES, identity_sae, random_training_sae, save_inference

PROVENANCE = {
    "trained_on": "base",
    "sparsity_key": "l1_coefficient",
    "sparsity_value": 1.0,
    "seed": 0,
    "role": "trained",
}


def activations(n: int = 200) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(4)) * 3


@pytest.mark.parametrize("b_dec", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_sae_gives_on_raw_activations_what_the_scaled_one_gives(
    architecture: str, b_dec: bool, tmp_path: Path
) -> None:
    c = 0.37
    save_inference(random_training_sae(architecture, b_dec=b_dec), tmp_path / "unfolded")
    scaled = SAE.load_from_disk(tmp_path / "unfolded")
    save_trained(random_training_sae(architecture, b_dec=b_dec), c, tmp_path / "folded", PROVENANCE)
    folded = SAE.load_from_disk(tmp_path / "folded")  # SAELens alone, no help of ours
    x = activations()
    expected_features = scaled.encode(c * x)
    assert torch.equal(folded.encode(x) > 0, expected_features > 0)
    assert 0 < (expected_features > 0).float().mean() < 1
    torch.testing.assert_close(folded(x), scaled(c * x) / c, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_then_unfold_returns_the_sae(architecture: str) -> None:
    sae = random_training_sae(architecture)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.fold_activation_norm_scaling_factor(0.402)
    assert not torch.equal(sae.state_dict()["W_enc"], before["W_enc"])
    sae.fold_activation_norm_scaling_factor(1 / 0.402)
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)


def test_too_little_memory_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_trained(random_training_sae("standard"), 1.7, tmp_path / "base-x", PROVENANCE)

    def load(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SAE, "load_from_disk", load)
    with pytest.raises(StudyError, match=r"base-x: out of memory while the SAE was loaded \(CUDA out of memory\)"):
        load_own(tmp_path / "base-x", "cpu")


def test_an_own_sae_comes_back_with_its_factor(tmp_path: Path) -> None:
    save_trained(random_training_sae("standard"), 1.7, tmp_path / "base-x", PROVENANCE)
    stored = load_own(tmp_path / "base-x", "cpu")
    assert (stored.name, stored.trained_on, stored.scale, stored.seed) == ("base-x", "base", 1.7, 0)
    assert (stored.architecture, stored.d_sae, stored.sparsity_value) == ("standard", 96, 1.0)


def test_a_batchtopk_sae_keeps_its_name_and_is_a_jumprelu_at_inference(tmp_path: Path) -> None:
    save_trained(random_training_sae("batchtopk"), 1.7, tmp_path / "b", PROVENANCE)
    stored = load_own(tmp_path / "b", "cpu")
    assert stored.architecture == "batchtopk" and stored.sae.cfg.architecture() == "jumprelu"


def test_an_unfolded_external_sae_is_folded_by_its_scale(tmp_path: Path) -> None:
    save_inference(random_training_sae("standard"), tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    stored = load_external("mine", "chat", tmp_path, 0.402, 1.9, "cpu")
    x = activations()
    assert stored.scale == 0.402
    torch.testing.assert_close(stored.reconstruct(x, 1.0)[1], plain(0.402 * x) / 0.402, atol=2e-5, rtol=1e-5)


def test_an_external_sae_without_scale_takes_raw_activations_at_the_models_own_factor(tmp_path: Path) -> None:
    save_inference(random_training_sae("standard"), tmp_path)
    assert load_external("mine", "chat", tmp_path, None, 1.9, "cpu").scale == 1.9


def test_an_external_sae_that_expects_scaled_activations_is_refused_without_its_scale(tmp_path: Path) -> None:
    sae = random_training_sae("standard")
    sae.cfg.normalize_activations = "expected_average_only_in"
    save_inference(sae, tmp_path)
    with pytest.raises(StudyError, match="expects scaled activations"):
        load_external("mine", "chat", tmp_path, None, 1.9, "cpu")
    assert load_external("mine", "chat", tmp_path, 2.0, 1.9, "cpu").scale == 2.0


def test_an_sae_that_normalizes_each_token_has_no_factor(tmp_path: Path) -> None:
    sae = random_training_sae("standard")
    sae.cfg.normalize_activations = "layer_norm"
    save_inference(sae, tmp_path)
    assert load_external("mine", "chat", tmp_path, None, 1.9, "cpu").scale is None
    with pytest.raises(StudyError, match="normalizes every token itself"):
        load_external("mine", "chat", tmp_path, 2.0, 1.9, "cpu")


def test_what_is_no_sae_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cfg\.json and sae_weights\.safetensors not found"):
        load_external("mine", "base", tmp_path, None, 1.0, "cpu")
    save_inference(identity_sae(), tmp_path / "cut")
    weights = tmp_path / "cut" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StudyError, match="the SAE cannot be loaded"):
        load_external("mine", "base", tmp_path / "cut", None, 1.0, "cpu")


def test_the_wrong_width_or_site_is_refused(tmp_path: Path) -> None:
    sae = identity_sae(16)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    save_inference(sae, tmp_path)
    stored = load_external("mine", "base", tmp_path, None, 1.0, "cpu")
    with pytest.raises(StudyError, match=r"d_in is 16, the site blocks\.4\.hook_resid_pre has d_model 32"):
        check_fits(stored, 32, "blocks.4.hook_resid_pre", tmp_path, accept_mismatch=True)
    check_fits(stored, 16, "blocks.4.hook_resid_pre", tmp_path, accept_mismatch=False)
    with pytest.raises(StudyError, match=r"was trained at blocks\.3\.hook_resid_post"):
        check_fits(stored, 16, "blocks.3.hook_resid_pre", tmp_path, accept_mismatch=False)
    check_fits(stored, 16, "blocks.3.hook_resid_pre", tmp_path, accept_mismatch=True)


def test_resid_post_of_a_layer_is_resid_pre_of_the_next() -> None:
    assert same_site_name("blocks.3.hook_resid_post") == "blocks.4.hook_resid_pre"
    assert same_site_name("blocks.3.hook_mlp_out") == "blocks.3.hook_mlp_out"


def test_provenance_says_the_factor(tmp_path: Path) -> None:
    save_trained(random_training_sae("topk"), 1.25, tmp_path, PROVENANCE)
    assert json.loads((tmp_path / "provenance.json").read_text())["sae_scale"] == 1.25
