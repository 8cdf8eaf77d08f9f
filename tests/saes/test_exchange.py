"""SAEs in and out of our form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_transfer.errors import StudyError
from sae_transfer.pipeline import run_stages
from sae_transfer.saes.exchange import import_sae, model_card, push_sae
from sae_transfer.study_file import load_study
from tests.saes.saes import random_training_sae, save_inference
from tests.studies import read_rows, write_study


def test_an_unfolded_sae_is_folded_on_the_way_in(tmp_path: Path) -> None:
    save_inference(random_training_sae("jumprelu"), tmp_path / "theirs")
    import_sae(str(tmp_path / "theirs"), tmp_path / "ours", sae_id=None, scale=0.402)
    theirs, ours = SAE.load_from_disk(tmp_path / "theirs"), SAE.load_from_disk(tmp_path / "ours")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(0.402 * x) / 0.402, atol=2e-5, rtol=1e-5)
    assert json.loads((tmp_path / "ours" / "provenance.json").read_text())["sae_scale"] == 0.402
    with pytest.raises(StudyError, match="is not empty"):
        import_sae(str(tmp_path / "theirs"), tmp_path / "ours", sae_id=None, scale=None)


def test_what_is_no_sae_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    with pytest.raises(StudyError):
        import_sae(str(tmp_path / "theirs"), tmp_path / "ours", sae_id=None, scale=None)
    assert not (tmp_path / "ours").exists()


def test_the_model_card_holds_the_saes_rows_and_goes_to_the_hub_with_it(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    study = load_study(write_study(tmp_path, *llama_pair, text_file), ["train.tokens=256"])
    run_stages(study, run, ("train",))
    directory = run / "saes" / "base-standard-w64-l1_1-s0"
    with pytest.raises(StudyError, match="has not been evaluated"):
        model_card(directory)
    run_stages(study, run, ("cross-eval",))
    card = model_card(directory)
    for row in read_rows(run):
        if row["sae"] == directory.name:
            assert f"| {row['model']} | {row['outliers']} | matched | {float(row['l0']):.1f} |" in card
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repository: str, exist_ok: bool) -> None:
            sent["repository"] = repository

        def upload_file(self, path_or_fileobj: Any, path_in_repo: str, repo_id: str) -> None:
            sent[path_in_repo] = path_or_fileobj

    monkeypatch.setattr("huggingface_hub.HfApi", Api)  # the hub needs a network
    assert push_sae(directory, "me/sae") == "https://huggingface.co/me/sae"
    assert sent["repository"] == "me/sae" and sent["README.md"] == card.encode()
    assert {"sae_weights.safetensors", "cfg.json", "provenance.json"} <= set(sent)


def test_pushing_without_a_hub_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="is no SAE of a run"):
        push_sae(tmp_path, "me/sae")
