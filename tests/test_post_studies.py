"""The shipped study files: each runs, cut down by `--set` alone, from a hub cache that has its models' real names."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file

from sae_transfer.cost.device import find_device
from sae_transfer.cost.estimate import estimate
from sae_transfer.cost.shape import model_shape
from sae_transfer.pipeline import STAGES, run_stages
from sae_transfer.saes.sources import same_model
from sae_transfer.study_file import load_study
from tests.checkpoints import GROUPED, SIZES, words_of
from tests.hub import COMMIT, make_hub_pair, make_hub_sae
from tests.studies import cli_anew, read_rows

CONFIGS = Path(__file__).parent.parent / "configs"
PUBLIC = sorted((CONFIGS / "public").glob("*.yaml"))
GIB = 2**30
INSTRUCTIONS = [words_of(seed, 6) for seed in range(4)]


@dataclass(frozen=True)
class Small:
    """What a pair is in small: its class, and the special tokens of its tokenizers."""

    architecture: str
    bos: str | None
    eos: tuple[str, str]
    template_tokens: tuple[str, ...] = ()


MISTRAL = Small("mistral", "<s>", ("</s>", "</s>"))
QWEN = Small("qwen2", None, ("<|endoftext|>", "<|im_end|>"), ("<|im_start|>",))
GEMMA = Small("gemma", "<bos>", ("<eos>", "<eos>"), ("<start_of_turn>", "<end_of_turn>"))
LLAMA = Small("llama", "<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>"))
POST = {"mistral-7b": MISTRAL, "qwen1.5-0.5b": QWEN, "gemma-2b": GEMMA}
OTHERS = {
    "gemma-scope-9b": Small("gemma2", "<bos>", ("<eos>", "<eos>")),
    "gemma-scope-2-270m": Small("gemma3_text", "<bos>", ("<eos>", "<eos>")),
    "gemma-2b-jb": GEMMA,
    "llama-3.1-8b": LLAMA,
    "qwen2.5-7b": QWEN,
    "mistral-7b-wg": MISTRAL,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
}
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "vocab_size": 256000,
}
# Sizes in the config.json of each study's models on the hub.
REAL = {
    "mistral-7b": MISTRAL_7B,
    "mistral-7b-wg": MISTRAL_7B,
    "gemma-2b": GEMMA_2B,
    "gemma-2b-jb": GEMMA_2B,
    "qwen1.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 2816,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "gemma-scope-2-270m": {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 2048,
        "vocab_size": 262144,
    },
    "gemma-scope-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "intermediate_size": 14336,
        "vocab_size": 256000,
    },
    "llama-3.1-8b": {**MISTRAL_7B, "model_type": "llama", "vocab_size": 128256},
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words_of(3, 16_000))
    return path


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": instruction, "input": "", "output": "-"} for instruction in INSTRUCTIONS]
    rows.append({"instruction": words_of(9, 6), "input": "the sea", "output": "-"})
    path = tmp_path_factory.mktemp("instructions") / "alpaca.json"
    path.write_text(json.dumps(rows))
    return path


def fill(hub: Path, study_file: Path, small: Small) -> None:
    """Put a study's models into a cache, with just as many layers as its site needs and one above."""
    study = load_study(study_file)
    make_hub_pair(
        hub,
        study.pair.base,
        study.pair.chat,
        small.architecture,
        bos=small.bos,
        eos=small.eos,
        template_tokens=small.template_tokens,
        num_hidden_layers=study.site.layer + 1 + (study.site.hook == "resid_post"),
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; and one thread, because two collapse when something else runs beside the tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    return tmp_path / "hub"


@pytest.mark.slow
@pytest.mark.parametrize("name", POST)
def test_a_study_of_the_post_runs_offline_under_its_real_names(
    name: str, hub: Path, text: Path, alpaca: Path, tmp_path: Path
) -> None:
    study_file, run = CONFIGS / f"{name}.yaml", tmp_path / "run"
    fill(hub, study_file, POST[name])
    sizes = [f"tokens.dataset={text}", "tokens.context_size=64", f"instruct.dataset={alpaca}", "saes.widths=[64]"]
    sizes += ["train.tokens=16k", "evaluate.tokens=2048", "evaluate.scale=[matched]", "instruct.max_new_tokens=8"]
    whole = load_study(study_file)
    if whole.finetune is not None:
        sizes.append("finetune.tokens=[2k]")
    run_stages(load_study(study_file, sizes), run)

    models = json.loads((run / "manifest.json").read_text())["models"]
    assert {side: (models[side]["source"], models[side]["revision"]) for side in models} == {
        "base": (whole.pair.base, COMMIT),
        "chat": (whole.pair.chat, COMMIT),
    }
    n_saes, n_sections, n_policies = (2 if whole.finetune is None else 3), 3, 2
    rows = read_rows(run)
    assert len(rows) == n_saes * 2 * n_policies
    assert {float(row["outlier_threshold"]) for row in rows} == {whole.evaluate.outlier_threshold}
    rollouts = [json.loads(line) for line in (run / "instruct" / "rollouts.jsonl").read_text().splitlines()]
    assert whole.instruct is not None and whole.instruct.template is not None
    assert [r["prompt"] for r in rollouts] == [whole.instruct.template.format(instruction=i) for i in INSTRUCTIONS]
    assert len(read_rows(run, "instruct/rows.csv")) == n_saes * n_sections * n_policies
    # The report knows the pair and sets the post's numbers beside ours.
    assert len(read_rows(run, "report/tables/published.csv")) >= n_saes * 2


def test_the_models_of_the_post_are_found_in_hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "hub", CONFIGS / "qwen1.5-0.5b.yaml", QWEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    checked = cli_anew("check", CONFIGS / "qwen1.5-0.5b.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "eos_token: base '<|endoftext|>', chat '<|im_end|>'" in checked.stdout


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_a_study_of_public_saes_runs_offline_under_their_real_names(
    path: Path, hub: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "gemma3_text", {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 16})
    shrink_what_is_written_into_saelens(monkeypatch)
    fill(hub, path, OTHERS[path.stem])
    sizes = [f"tokens.dataset={text}", "tokens.context_size=64", "evaluate.tokens=1024"]
    sizes += ["evaluate.outlier_threshold=9", "evaluate.outliers=[excluded]"]
    study = load_study(path, sizes)
    for sae in study.external_saes:
        assert sae.release is not None and sae.id is not None
        make_hub_sae(hub, sae.release, sae.id, hook_name=study.site.hook_name)
    run_stages(study, tmp_path / "run", STAGES if path.stem == "gemma-2b-jb" else ("tokens", "cross-eval"))
    rows = read_rows(tmp_path / "run")
    assert {row["sae"] for row in rows} == {sae.name for sae in study.external_saes}
    mse = {(row["sae"], row["model"], row["scale"]): float(row["mse"]) for row in rows}
    assert len(mse) == len(rows) == len(study.external_saes) * 2 * 2  # models and scale policies
    for (sae, model, scale), value in mse.items():
        agree = value == pytest.approx(mse[sae, model, "raw" if scale == "matched" else "matched"], rel=1e-5)
        brings_tokens_to_one_norm = sae == "base-wg"
        assert agree == (sae.startswith(model) or brings_tokens_to_one_norm)


def shrink_what_is_written_into_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma Scope's sizes stand in SAELens's code; those of Gemma Scope 2 it asks the hub for, cache or not."""
    config_of = pretrained_sae_loaders.get_gemma_2_config_from_hf

    def small_config(*arguments: Any) -> dict[str, Any]:
        return {**config_of(*arguments), "d_in": 32, "d_sae": 64}

    def shapes(repository: str, name: str) -> dict[str, list[int]]:
        file = pretrained_sae_loaders.hf_hub_download(repository, name)
        return {key: list(tensor.shape) for key, tensor in load_file(file).items()}

    monkeypatch.setattr(pretrained_sae_loaders, "get_gemma_2_config_from_hf", small_config)
    monkeypatch.setattr(pretrained_sae_loaders, "get_safetensors_tensor_shapes", shapes)


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_public_saes_are_of_the_studys_models_and_layer(path: Path) -> None:
    study = load_study(path)
    assert study.saes is None and set(study.evaluate.scale) == {"matched", "raw"}
    releases = get_pretrained_saes_directory()
    for sae in study.external_saes:
        entry = releases[str(sae.release)]
        assert sae.id in entry.saes_map
        sides = (study.pair.base, study.pair.chat)
        own, other = sides if sae.trained_on == "base" else sides[::-1]
        assert same_model(entry.model, own) and not same_model(entry.model, other)
        layer = re.search(r"layer_(\d+)|blocks\.(\d+)|^l(\d+)r", str(sae.id))
        assert layer and int(next(filter(None, layer.groups()))) == study.site.layer


@pytest.mark.parametrize("name", REAL)
def test_the_head_of_a_study_file_says_what_check_estimates(name: str) -> None:
    path = next(CONFIGS.rglob(f"{name}.yaml"))
    cost = estimate(load_study(path), model_shape(REAL[name]))
    head = path.read_text().partition("\nname:")[0].replace("\n# ", " ")
    found = re.search(r"at least ([\d.]+) hours.*?, ([\d.]+) GiB of its memory, ([\d.]+) GiB of disk", head)
    assert found
    peak = max(stage.memory.total for stage in cost.stages)
    expected = (cost.hours(find_device("h200")), peak / GIB, cost.disk.total / GIB)
    assert [float(number) for number in found.groups()] == pytest.approx(expected, rel=0.1, abs=0.5)
    assert float(found[1]) == pytest.approx(expected[0], rel=0.1)
