"""What is said where it cannot be written."""

import subprocess
import sys
from pathlib import Path

from tests.studies import write_study


def test_a_full_disk_behind_stderr_ends_nothing(llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, *llama_pair, text_file)
    command = [sys.executable, "-m", "sae_transfer", "train", str(study), "--out", str(tmp_path / "run")]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, check=False).returncode == 0
    assert len(list(tmp_path.glob("run/saes/*/sae_weights.safetensors"))) == 2
