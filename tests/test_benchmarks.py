"""The benchmarks and the smoke test of a GPU run, in small; what they measure is asserted nowhere."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_transfer.cost.shape import model_shape
from sae_transfer.cost.work import head_part, layers_part, reconstruct_part
from tests.cost.shapes import MISTRAL
from tests.studies import run_script

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = "--d-model 32 --heads 4 --kv-heads 2 --d-mlp 64 --layers 3 --site 1 --d-vocab 300 --context 64"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from Linux's kernel")
@pytest.mark.parametrize(("form", "architecture"), [("mistral", "standard"), ("qwen2", "topk")])
def test_the_evaluation_benchmark_finds_saelens_numbers(form: str, architecture: str, tmp_path: Path) -> None:
    sizes = f"{SMALL} --saes 2 --d-sae 128 --repeats 2 --sequences 6 --prompts 1 4"
    options = f"{sizes} --form {form} --architecture {architecture} --json {tmp_path / 'out.json'}"
    done = run_script(SCRIPTS / "bench_eval.py", *options.split())
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["threads"] == 1
    assert re.findall(r"(\d+) prompts", " ".join(found["differences"])) == ["6", "1", "4"]
    assert all(len(side["runs"]) == 2 for side in found["seconds"].values())
    assert "run_evals, defaults" in done.stdout


SMALL_STEP = (
    "--no-compile --d-sae 256 --d-model 32 --step-batch 64 --steps 5 --steps-a-round 2 --l0 10 --dictionary-l0 4"
)
SMALL_LM = "--d-model 32 --heads 4 --kv-heads 2 --d-mlp 64 --layers 3 --site 1 --d-vocab 300"
OTHERS = {
    "bench_gpu.py": "--small --repeats 1 --json {out}",
    "bench_train.py": f"--repeats 1 --widths 64 --tokens 16384 --norm-batches 4 {SMALL_STEP} --json {{out}}",
    "bench_checkpoint.py": "--d-in 32 --widths 64 --repeats 1 --json {out}",
    "bench_lm.py": f"{SMALL_LM} --contexts 32 --tokens 224 --prompts 2 3 --repeats 1 --json {{out}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS)
def test_the_other_benchmarks_run(script: str, tmp_path: Path) -> None:
    done = run_script(SCRIPTS / script, *OTHERS[script].format(out=tmp_path / "out.json").split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("script", ["bench_eval.py", "bench_lm.py"])
@pytest.mark.parametrize("options", ["--site 0", "--site 8 --layers 8", "--prompts 2 0"])
def test_a_site_or_batches_that_cannot_be_are_refused(script: str, options: str) -> None:
    done = run_script(SCRIPTS / script, *options.split())
    assert done.returncode == 2 and f"{options.split()[0]}: got " in done.stderr


@pytest.mark.slow
def test_the_smoke_test_passes_in_small() -> None:
    done = subprocess.run([SCRIPTS / "smoke_gpu.sh", "--small"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all well" in done.stdout and done.stdout.count("training, gone on with") == 2


def test_the_evaluation_benchmark_counts_the_products_that_check_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench_eval = importlib.import_module("bench_eval")
    sizes = bench_eval.Sizes(512, 8, 3, 8, 4, 1792, 32000, 1024, 2, 4, 4096)
    mistral = {**MISTRAL, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape = model_shape({**mistral, "intermediate_size": 1792, "num_hidden_layers": 8})
    parts = [
        layers_part(shape, 3 + 5 * 5, 1024, "float32"),
        head_part(shape, "float32", products=2),
        *4 * [head_part(shape, "float32"), reconstruct_part(512, 4096)],
    ]
    counted = sum(2 * m * k * n * number for number, (m, k, n) in bench_eval.products(sizes))
    # but for the norms' weights
    assert counted == pytest.approx(2 * 1024 * sum(part.flops for part in parts), rel=1e-3)


def test_the_evaluation_benchmark_stops_at_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench_eval = importlib.import_module("bench_eval")
    same = bench_eval.Values(3.0, 3.5, 5.0, 0.1, 0.75, 0.9, 30.0, 2.0)
    other = bench_eval.Values(3.0, 3.5001, 5.0, 0.1, 0.75, 0.9, 30.0, 2.0)
    bench_eval.check(bench_eval.differences([same], [same], [0.1]), "theirs")
    with pytest.raises(SystemExit, match="ce_sae differs from theirs"):
        bench_eval.check(bench_eval.differences([same], [other], [0.1]), "theirs")
    with pytest.raises(SystemExit, match="kl differs"):
        bench_eval.check(bench_eval.differences([same], [same], [0.1001]), "theirs")
