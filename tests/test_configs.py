"""The study files that are shipped, and the schema for editors."""

import json
from pathlib import Path

import pytest

from sae_transfer import demo
from sae_transfer.config import json_schema
from sae_transfer.study_file import load_study

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_file_is_a_study(path: Path) -> None:
    assert load_study(path).name == path.stem


def test_the_demo_asks_for_at_most_400_000_tokens() -> None:
    study = load_study(demo.STUDY)
    assert study.evaluate.tokens + study.n_training_tokens <= 400_000
    assert (CONFIGS / "demo.yaml").read_text() == demo.STUDY.read_text()


def test_the_schema_beside_the_study_files_is_the_present_one() -> None:
    assert json.loads((CONFIGS / "study.schema.json").read_text()) == json.loads(json.dumps(json_schema()))
