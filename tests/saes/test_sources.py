"""SAEs from elsewhere: found, converted where they are old, refused where they are none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE, SkipTranscoder, SkipTranscoderConfig
from safetensors.torch import load_file, save_file

from sae_transfer.errors import StudyError
from sae_transfer.saes.sources import fetch, recorded_identity, same_model
from sae_transfer.saes.store import load_external
from tests.saes.saes import ARCHITECTURES, random_training_sae, save_inference

D_IN, D_SAE = 32, 96
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As SAELens 2 and 3 wrote it beside the post's SAEs, the language model runner's settings and all.
OLD_CONFIG = {
    "model_name": "mistral-7B",
    "model_class_name": "HookedTransformer",
    "hook_name": "blocks.16.hook_resid_pre",
    "hook_layer": 16,
    "hook_head_index": None,
    "dataset_path": "monology/pile-uncopyrighted",
    "is_dataset_tokenized": False,
    "context_size": 2048,
    "prepend_bos": True,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "b_dec_init_method": "zeros",
    "expansion_factor": 3,
    "activation_fn": "relu",
    "normalize_sae_decoder": False,
    "apply_b_dec_to_input": False,
    "dtype": "torch.float32",
    "device": "cuda",
    "seed": 42,
    "l1_coefficient": 5,
    "lp_norm": 1.0,
    "scale_sparsity_penalty_by_decoder_norm": True,
    "normalize_activations": "expected_average_only_in",
    "lr": 5e-05,
    "sae_lens_version": "2.1.3",
    "sae_lens_training_version": "2.1.3",
}
# Older still: other names, the layer apart, sizes left to the code, a flag instead of a word.
OLDEST_CONFIG = {
    "model_name": "gelu-1l",
    "hook_point": "blocks.{layer}.hook_resid_pre",
    "hook_point_layer": 7,
    "hook_point_head_index": None,
    "d_in": D_IN,
    "d_sae": None,
    "expansion_factor": 3,
    "dtype": "torch.float32",
    "l1_coefficient": 0.5,
    "normalize_activations": False,
    "apply_b_dec_to_input": None,
}


def old_weights(seed: int = 0, d_in: int = D_IN) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, D_SAE), "W_dec": (D_SAE, d_in), "b_enc": (D_SAE,), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def old_sae(directory: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    directory.mkdir(parents=True)
    (directory / "cfg.json").write_text(json.dumps(config))
    save_file({**old_weights(), **tensors}, directory / "sae_weights.safetensors")
    return directory


def hub_snapshot(tmp_path: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    return root / "snapshots" / COMMIT


@pytest.fixture
def acts() -> torch.Tensor:
    return torch.randn(10, D_IN, generator=torch.Generator().manual_seed(3))


def reconstruction(weights: dict[str, torch.Tensor], x: torch.Tensor, *, b_dec_to_input: bool) -> torch.Tensor:
    centred = x - weights["b_dec"] if b_dec_to_input else x
    return torch.relu(centred @ weights["W_enc"] + weights["b_enc"]) @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_directory_in_the_current_form_is_itself(architecture: str, tmp_path: Path) -> None:
    directory = save_inference(random_training_sae(architecture), tmp_path / "sae")
    assert fetch(str(directory), tmp_path / "cache") == directory
    assert not (tmp_path / "cache").exists()


def test_an_old_directory_is_converted_unfolded(tmp_path: Path, acts: torch.Tensor) -> None:
    old = old_sae(tmp_path / "old", OLD_CONFIG)
    new = fetch(str(old), tmp_path / "cache")
    assert new.parent == tmp_path / "cache"
    for name, tensor in load_file(new / "sae_weights.safetensors").items():
        torch.testing.assert_close(tensor, old_weights()[name], rtol=0, atol=0)
    sae = SAE.load_from_disk(new)
    assert (sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.dtype) == ("standard", D_IN, D_SAE, "float32")
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    assert sae.cfg.apply_b_dec_to_input is False
    cfg = json.loads((new / "cfg.json").read_text())
    assert recorded_identity(cfg) == recorded_identity(OLD_CONFIG) == ("mistral-7B", "blocks.16.hook_resid_pre")
    assert cfg["metadata"]["context_size"] == 2048
    with pytest.raises(StudyError, match="expects scaled activations"):
        load_external("post", "base", new, None, 1.0, "cpu")
    stored = load_external("post", "base", new, 0.4, 1.0, "cpu")
    assert (stored.scale, stored.sparsity_key, stored.sparsity_value) == (0.4, "l1_coefficient", 5)
    expected = reconstruction(old_weights(), acts * 0.4, b_dec_to_input=False) / 0.4
    torch.testing.assert_close(stored.reconstruct(acts, 1.0)[1], expected, rtol=1e-5, atol=1e-5)


def test_the_oldest_form_is_filled_in(tmp_path: Path, acts: torch.Tensor) -> None:
    old = old_sae(tmp_path / "old", OLDEST_CONFIG, scaling_factor=torch.ones(D_SAE))
    new = fetch(str(old), tmp_path / "cache")
    sae = SAE.load_from_disk(new)
    assert sae.cfg.d_sae == D_SAE
    assert sae.cfg.normalize_activations == "none"
    assert sae.cfg.metadata.hook_name == "blocks.7.hook_resid_pre" == recorded_identity(OLDEST_CONFIG)[1]
    expected = reconstruction(old_weights(), acts, b_dec_to_input=True)  # what was true when nothing was said
    torch.testing.assert_close(sae(acts), expected, rtol=1e-5, atol=1e-5)


def test_an_old_topk_sae_stays_one(tmp_path: Path, acts: torch.Tensor) -> None:
    config = {**OLD_CONFIG, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    del config["activation_fn"]
    sae = SAE.load_from_disk(fetch(str(old_sae(tmp_path / "old", config)), tmp_path / "cache"))
    assert sae.cfg.architecture() == "topk"
    assert (sae.encode(acts) > 0).sum(-1).max() == 4


def test_an_activation_function_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    old = old_sae(tmp_path / "old", {**OLD_CONFIG, "activation_fn": "tanh-relu"})
    with pytest.raises(StudyError, match="activation function is tanh-relu"):
        fetch(str(old), tmp_path / "cache")


def test_a_conversion_is_kept_until_its_source_changes(tmp_path: Path) -> None:
    old = old_sae(tmp_path / "old", OLD_CONFIG)
    new = fetch(str(old), tmp_path / "cache")
    written = (new / "cfg.json").stat().st_mtime_ns
    assert fetch(str(old), tmp_path / "cache") == new
    assert (new / "cfg.json").stat().st_mtime_ns == written
    (old / "cfg.json").write_text(json.dumps({**OLD_CONFIG, "model_name": "other"}))
    cfg = json.loads((fetch(str(old), tmp_path / "cache") / "cfg.json").read_text())
    assert recorded_identity(cfg)[0] == "other"
    save_file(old_weights(seed=1), old / "sae_weights.safetensors")
    weights = load_file(fetch(str(old), tmp_path / "cache") / "sae_weights.safetensors")
    assert torch.equal(weights["W_enc"], old_weights(seed=1)["W_enc"])


def test_a_hub_repository_or_a_folder_of_it_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_snapshot(tmp_path, "org/saes", monkeypatch)
    save_inference(random_training_sae("topk"), snapshot)
    old_sae(snapshot / "layer_16" / "w96", OLD_CONFIG)
    whole = SAE.load_from_disk(fetch("org/saes", tmp_path / "cache"))
    assert whole.cfg.architecture() == "topk"
    for arguments in ({"source": "org/saes/layer_16/w96"}, {"source": "org/saes", "sae_id": "layer_16/w96"}):
        directory = fetch(**arguments, cache=tmp_path / "cache")
        assert directory == tmp_path / "cache" / "org--saes--layer_16--w96"
        assert SAE.load_from_disk(directory).cfg.metadata.model_name == "mistral-7B"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "gone"))
    assert fetch("org/saes", tmp_path / "cache").is_dir(), "what is converted is not asked for again"
    with pytest.raises(StudyError, match="org/other: is no directory, no SAELens release and no wandb artifact"):
        fetch("org/other", tmp_path / "cache")
    with pytest.raises(StudyError, match="not to be had as a hub repository"):
        fetch("nothing", tmp_path / "cache")


def test_a_release_comes_by_its_names_and_folded_where_its_factor_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acts: torch.Tensor
) -> None:
    snapshot = hub_snapshot(tmp_path, "jbloom/Gemma-2b-Residual-Stream-SAEs", monkeypatch)
    config = {**OLD_CONFIG, "model_name": "gemma-2b", "hook_name": "blocks.12.hook_resid_post"}
    old_sae(snapshot / "gemma_2b_blocks.12.hook_resid_post_16384", config)
    new = fetch("gemma-2b-res-jb", tmp_path / "cache", sae_id="blocks.12.hook_resid_post")
    assert fetch("gemma-2b-res-jb/blocks.12.hook_resid_post", tmp_path / "cache") == new
    sae, factor = SAE.load_from_disk(new), 0.21381938399317255  # SAELens's table has it
    assert sae.cfg.normalize_activations == "none"
    expected = reconstruction(old_weights(), acts * factor, b_dec_to_input=False) / factor
    torch.testing.assert_close(sae(acts), expected, rtol=1e-5, atol=1e-5)
    assert recorded_identity(json.loads((new / "cfg.json").read_text())) == ("gemma-2b", "blocks.12.hook_resid_post")
    with pytest.raises(StudyError, match=r"not to be had from the hub or its local cache"):
        fetch("gemma-2b-res-jb", tmp_path / "cache", sae_id="blocks.6.hook_resid_post")
    with pytest.raises(StudyError, match=r"has no SAE 'blocks.13.hook_resid_post'\n.*blocks.12.hook_resid_post"):
        fetch("gemma-2b-res-jb", tmp_path / "cache", sae_id="blocks.13.hook_resid_post")
    with pytest.raises(StudyError, match=r"no such release\n.*gemma-2b-res-jb"):
        fetch("gemma-2b-resjb", tmp_path / "cache", sae_id="blocks.12.hook_resid_post")


class FakeArtifact:
    """What wandb's Api gives for a name; its download is the one call that needs the network."""

    def __init__(self, files: Path) -> None:
        self._files = files

    def download(self, root: str) -> str:
        for file in self._files.iterdir():
            (Path(root) / file.name).write_bytes(file.read_bytes())
        return root


def test_a_wandb_artifact_is_downloaded_once_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, asked = old_sae(tmp_path / "artifact", OLD_CONFIG), []

    def artifact(name: str) -> FakeArtifact:
        asked.append(name)
        return FakeArtifact(old)

    monkeypatch.setattr("wandb.Api", lambda **_: SimpleNamespace(artifact=artifact))
    name = "someone/mats-hugo/sae_mistral_16:v8"
    directory = fetch(name, tmp_path / "cache")
    assert SAE.load_from_disk(directory).cfg.metadata.model_name == "mistral-7B"
    assert fetch(name, tmp_path / "cache") == directory
    assert asked == [name]
    assert json.loads((directory / "origin.json").read_text()) == {"source": name}
    (old / "sae_weights.safetensors").rename(old / "model.safetensors")
    with pytest.raises(StudyError, match=r"v9: is not an SAE of SAELens.*found: cfg.json, model.safetensors"):
        fetch("someone/mats-hugo/sae_mistral_16:v9", tmp_path / "cache")


def test_a_wandb_artifact_without_a_login_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(StudyError, match=r"cannot be had \(UsageError.*\n.*wandb login"):
        fetch("someone/mats-hugo/sae:v0", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_is_not_an_sae_is_refused_with_what_was_found(tmp_path: Path, llama_pair: tuple[Path, Path]) -> None:
    def refused(source: Path, message: str) -> None:
        with pytest.raises(StudyError, match=message):
            fetch(str(source), tmp_path / "cache")

    refused(llama_pair[0], r"is not an SAE of SAELens \(cfg.json and sae_weights.safetensors\); found: .*config.json")
    refused(tmp_path / "absent", "is not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found: nothing")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "cfg.json").write_text("{}")
    torch.save({}, pickled / "sae_weights.pt")
    refused(pickled, r"weights are pickled \(sae_weights.pt\).*never read\n.*safetensors.torch.save_file")
    refused(pickled / "cfg.json", "is not a directory")
    old_sae(tmp_path / "many" / "a", OLD_CONFIG)
    old_sae(tmp_path / "many" / "b", OLD_CONFIG)
    refused(tmp_path / "many", rf"holds its SAEs in folders: a, b\n.*name one: {tmp_path}/many/a")
    foreign = old_sae(tmp_path / "foreign", OLD_CONFIG)
    save_file({"encoder.weight": torch.ones(2, 2)}, foreign / "sae_weights.safetensors")
    refused(foreign, "holds encoder.weight, and no W_enc")
    cut = old_sae(tmp_path / "cut", OLD_CONFIG)
    (cut / "sae_weights.safetensors").write_bytes(b"0123")
    refused(cut, "is not an SAE that SAELens can read")
    listed = old_sae(tmp_path / "listed", OLD_CONFIG)
    (listed / "cfg.json").write_text("[]")
    refused(listed, "cfg.json is a list, not an object")
    (listed / "cfg.json").write_text("{")
    refused(listed, "cfg.json cannot be read")
    unheard = old_sae(tmp_path / "unheard", {**OLD_CONFIG, "architecture": "newest"})
    refused(unheard, "is not an SAE that SAELens can read.*newest")
    transcoder = SkipTranscoder(SkipTranscoderConfig(d_in=8, d_sae=16, d_out=8, apply_b_dec_to_input=False))
    transcoder.save_model(tmp_path / "transcoder")
    refused(tmp_path / "transcoder", "is a skip_transcoder")
    assert not (tmp_path / "cache").exists()


def test_pickled_and_foreign_hub_repositories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_snapshot(tmp_path, "org/saes", monkeypatch)
    (snapshot / "ae.pt").write_bytes(b"")
    with pytest.raises(StudyError, match=r"org/saes: its weights are pickled \(ae.pt\)"):
        fetch("org/saes", tmp_path / "cache")
    old_sae(snapshot / "inner", OLD_CONFIG)
    with pytest.raises(StudyError, match=r"holds its SAEs in folders: inner\n.*org/saes/inner"):
        fetch("org/saes", tmp_path / "cache")
    with pytest.raises(StudyError, match=r"org/saes/nowhere: is not an SAE.*found: nothing"):
        fetch("org/saes/nowhere", tmp_path / "cache")


@pytest.mark.parametrize(
    ("recorded", "source"),
    [
        ("mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("mistral-7B-instruct", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("qwen1.5-0.5B", "Qwen/Qwen1.5-0.5B"),
        ("qwen1.5-0.5B-chat", "Qwen/Qwen1.5-0.5B-Chat"),
        ("gemma-2b", "google/gemma-2b"),
        ("gemma-2b-it", "google/gemma-2b-it"),
        ("gpt2-small", "openai-community/gpt2"),
        ("google/gemma-2b", "unsloth/gemma-2b"),
        ("Qwen/Qwen1.5-0.5B", "qwen/qwen1.5-0.5b"),
        ("demo:base", "demo:base"),
        # In doubt: names that say nothing.
        ("my-model", "Qwen/Qwen1.5-0.5B"),
        ("/data/runs/base", "google/gemma-2b"),
        ("gemma-2b", "not-known"),
    ],
)
def test_names_of_one_model_are_the_same(recorded: str, source: str) -> None:
    assert same_model(recorded, source)


@pytest.mark.parametrize(
    ("recorded", "source"),
    [
        ("mistral-7B", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("mistral-7B-instruct", "mistralai/Mistral-7B-v0.1"),
        ("qwen1.5-0.5B", "Qwen/Qwen1.5-0.5B-Chat"),
        ("gemma-2b", "google/gemma-2b-it"),
        ("google/gemma-2b", "someone/their-own"),
        ("demo:base", "demo:chat"),
        ("gemma-2b", "demo:base"),
    ],
)
def test_names_of_two_known_models_differ(recorded: str, source: str) -> None:
    assert not same_model(recorded, source)
    assert not same_model(recorded, source, config_name=recorded), "config_name counts for directories only"


def test_a_directory_is_another_model_only_when_its_name_is_one(tmp_path: Path) -> None:
    for name in ("base", "Qwen1.5-0.5B", "gemma-2b-it"):
        (tmp_path / name).mkdir()
    assert same_model("gemma-2b", str(tmp_path / "base"))
    assert same_model("google/gemma-2b", str(tmp_path / "base"), config_name="Qwen/Qwen1.5-0.5B")
    assert same_model("qwen1.5-0.5B", str(tmp_path / "Qwen1.5-0.5B"))
    assert not same_model("gemma-2b", str(tmp_path / "Qwen1.5-0.5B"))
    assert not same_model("google/gemma-2b", str(tmp_path / "gemma-2b-it"))
    assert same_model("google/gemma-2b", str(tmp_path / "gemma-2b-it"), config_name="google/gemma-2b")


def test_a_configuration_that_says_nothing_has_no_identity() -> None:
    assert recorded_identity({"d_in": 4}) == (None, None)
    assert recorded_identity({"metadata": {"model_name": "m", "hook_name": "h"}}) == ("m", "h")
