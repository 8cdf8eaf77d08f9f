"""The study files that are shipped, and the schema for editors."""

import json
from pathlib import Path

import pytest

from sae_transfer import demo
from sae_transfer.config import json_schema
from sae_transfer.study_file import load_study
from sae_transfer.sweep.cells import expand
from sae_transfer.sweep.file import load_sweep

CONFIGS = Path(__file__).parent.parent / "configs"


STUDIES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("public/*.yaml")])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_file_is_a_study(path: Path) -> None:
    assert load_study(path).name == path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_sweep_file_is_a_sweep_of_several_cells(path: Path) -> None:
    assert len(expand(load_sweep(path), ())) > 1


def test_the_demo_asks_for_at_most_400_000_tokens() -> None:
    study = load_study(demo.STUDY)
    assert study.evaluate.tokens + study.n_training_tokens <= 400_000
    assert (CONFIGS / "demo.yaml").read_text() == demo.STUDY.read_text()


def test_the_schema_beside_the_study_files_is_the_present_one() -> None:
    assert json.loads((CONFIGS / "study.schema.json").read_text()) == json.loads(json.dumps(json_schema()))
