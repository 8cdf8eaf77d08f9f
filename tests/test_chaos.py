"""The campaign of kills, in small: one aimed at every stage of a whole run."""

import json
from pathlib import Path

import pytest

from tests.studies import run_script

SCRIPT = Path(__file__).parent.parent / "scripts" / "chaos.py"


@pytest.mark.slow
def test_a_run_killed_in_its_stages_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    counts_file = tmp_path / "counts.json"
    options = ("--rounds", "11", "--each", "1", "--out", tmp_path / "runs", "--json", counts_file)
    done = run_script(SCRIPT, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(counts_file.read_text())
    stages = counts["stages"].values()
    assert counts["rounds"] >= 11 and all(stage["kills"] == stage["resumed"] >= 1 for stage in stages)
    assert not any(stage["lost"] or stage["different"] for stage in stages)
