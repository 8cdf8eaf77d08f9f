"""What `check` says before anything is loaded."""

from pathlib import Path

import pytest

from sae_transfer.cost.device import find_device
from sae_transfer.errors import StudyError
from sae_transfer.plan import describe
from sae_transfer.study_file import load_study
from tests.checkpoints import make_chat_of, make_checkpoint
from tests.saes.saes import random_training_sae, save_inference
from tests.studies import write_study


def test_a_hook_point_that_the_architecture_lacks_is_refused_without_weights(tmp_path: Path, text_file: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gpt_neox")
    chat = make_chat_of(base, tmp_path / "chat")
    for side in (base, chat):
        (side / "model.safetensors").unlink()

    def lines(hook: str) -> list[str]:
        study = load_study(write_study(tmp_path, base, chat, text_file, site={"layer": 1, "hook": hook}))
        return list(describe(study, find_device("cpu"), gpu=False))

    assert "blocks.1.hook_mlp_out" in " ".join(lines("mlp_out"))
    with pytest.raises(StudyError, match=r"has no blocks\.1\.hook_resid_mid"):
        lines("resid_mid")


def test_every_stage_says_what_it_needs(llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, *llama_pair, text_file, finetune={"tokens": 1024}))
    said = list(describe(study, find_device("l4"), gpu=True))
    for stage in ("training", "fine-tuning", "evaluation", "outliers"):
        assert any(line.startswith(f"memory      {stage}: ") and ", fits (" in line for line in said)
        assert any(line.startswith(f"hours       {stage}: ") for line in said)
    assert not any("would fit" in line for line in said)


def test_an_sae_that_is_none_for_the_site_is_refused(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    there = tmp_path / "sae"
    there.mkdir()
    external = [{"name": "x", "trained_on": "base", "path": str(there)}]
    study = load_study(write_study(tmp_path, *llama_pair, text_file, external_saes=external))

    def said() -> str:
        return "\n".join(describe(study, find_device("cpu"), gpu=False))

    with pytest.raises(StudyError, match=r"sae: got no cfg\.json of SAELens; expected an SAE with d_in 32"):
        said()
    save_inference(random_training_sae("standard"), there)
    assert f"x, trained on base, from {there}" in said()
    config = there / "cfg.json"
    config.write_text(config.read_text().replace('"d_in": 32', '"d_in": 33'))
    with pytest.raises(StudyError, match="sae: got d_in 33; expected an SAE with d_in 32"):
        said()
