"""The campaign of kills, in small: one aimed at every stage of a whole run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "chaos.py"


@pytest.mark.slow
def test_a_run_killed_in_its_stages_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        SCRIPT,
        "--rounds",
        "11",
        "--each",
        "1",
        "--out",
        tmp_path / "runs",
        "--json",
        tmp_path / "counts.json",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    stages = counts["stages"].values()
    assert counts["rounds"] >= 11 and all(stage["kills"] == stage["resumed"] >= 1 for stage in stages)
    assert not any(stage["lost"] or stage["different"] for stage in stages)
