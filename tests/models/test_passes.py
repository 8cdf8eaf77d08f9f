"""How sequences are cut into passes, and memory that really runs out: in a child process with a limit of its own."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sae_transfer.errors import is_out_of_memory
from sae_transfer.models import passes
from sae_transfer.models.passes import AtOnce, in_passes
from tests.checkpoints import make_checkpoint
from tests.saes.saes import random_training_sae, save_inference
from tests.studies import run_script

# 1024 tokens of a pass take 128 MiB for each `[tok d_mlp]`, of which a gated MLP holds three.
N_SEQUENCES, N_POSITIONS, D_MLP = 16, 64, 2**15
IN_LITTLE_MEMORY = f"""
import json, logging, resource, sys
from pathlib import Path
import numpy as np, torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM
from sae_transfer.analysis.cells import Section, evaluate_model
from sae_transfer.analysis.site import collect_activations
from sae_transfer.errors import StudyError
from sae_transfer.models.pair import resolve
from sae_transfer.models.splice import open_splicer
from sae_transfer.saes.store import StoredSAE

torch.set_num_threads(1)
directory = Path(sys.argv[1])
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("sae_transfer.models.passes").addHandler(handler)
model = AutoModelForCausalLM.from_pretrained(directory / "model").eval().requires_grad_(False)
splicer = open_splicer(model, "blocks.1.hook_resid_pre", resolve(str(directory / "model")))
rows = np.random.default_rng(0).integers(3, 250, ({N_SEQUENCES}, {N_POSITIONS}))
saes = [StoredSAE("s", "base", SAE.load_from_disk(directory / "sae"), 0.9)]
section = Section.whole(rows.shape)

def evaluate(site):
    cells = evaluate_model(
        splicer, rows, site, section, saes, norm_scale=0.9, counted={{"kept": section.positions}},
        scale_policies=["matched"], group_size=8, batch_size=8, device="cpu", progress=lambda n: None)
    (cell,) = cells.values()
    return {{**{{name: sums.tolist() for name, sums in cell.sums.items()}}, "alive": cell.alive.sum(1).tolist()}}

def collect(name):
    return collect_activations(splicer, rows, d_model=32, batch_size=8, device="cpu", path=directory / name,
                               progress=lambda n: None)

def leave(mib):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + mib * 2**20, resource.RLIM_INFINITY))

found = {{"plenty": evaluate(site := collect("plenty.npy"))}}
assert not warnings
leave(int(sys.argv[2]))
found["little"] = evaluate(site)
found["warnings"] = list(warnings)
found["acts_equal"] = bool(np.allclose(collect("little.npy").acts, site.acts, atol=1e-5))
found["warnings_collecting"] = warnings[len(found["warnings"]):]
leave(int(sys.argv[3]))
try:
    evaluate(site)
except StudyError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory can be limited on Linux only")
def test_out_of_memory_halves_the_pass_once_and_changes_no_number(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama", intermediate_size=D_MLP)
    save_inference(random_training_sae("standard"), tmp_path / "sae")
    mib_of_one = 8 * N_POSITIONS * D_MLP * 4 / 2**20  # with 8 sequences a pass
    arguments = [str(tmp_path), str(int(2.2 * mib_of_one)), str(int(0.7 * mib_of_one))]
    (tmp_path / "in_little_memory.py").write_text(IN_LITTLE_MEMORY)
    child = run_script(tmp_path / "in_little_memory.py", *arguments)
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert len(found["warnings"]) == 1 and "4 sequences" in found["warnings"][0]
    assert "memory" in found["warnings"][0]
    for name, plenty in found["plenty"].items():
        assert found["little"][name] == pytest.approx(plenty, rel=1e-6, abs=1e-5), name
    assert len(found["warnings_collecting"]) == 1 and found["acts_equal"]
    assert "also after halving" in found["error"] and "evaluate.batch_size" in found["error"]


def test_only_errors_of_memory_are_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(2**60)
    assert is_out_of_memory(too_large.value)
    for said in (
        "CUDA error: out of memory\nCompile with ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: insufficient resources when calling `cusparseSpMM(...)`",
    ):
        assert is_out_of_memory(RuntimeError(said)), said
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as shapes:
        torch.mm(torch.ones(2, 3), torch.ones(2, 3))
    assert not is_out_of_memory(shapes.value) and not is_out_of_memory(KeyError("can't allocate memory"))


@pytest.mark.parametrize(("batch_size", "tokens"), [(8, 10_000), (8, 30), (8, 1), (3, 70), (100, 70)])
def test_passes_cover_every_sequence_once_and_cross_no_batch(
    batch_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "AT_ONCE", {"cpu": AtOnce(tokens, 1)})
    cuts: list[slice] = []
    done: list[int] = []
    in_passes(
        lambda rows, _: cuts.append(rows),
        21,
        10,
        batch_size=batch_size,
        device="cpu",
        progress=lambda n: done.append(n),
    )
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(21))
    assert all(cut.start // batch_size == (cut.stop - 1) // batch_size for cut in cuts)
    assert all((cut.stop - cut.start) * 10 <= max(tokens, 10) for cut in cuts)
    assert done == [cut.stop for cut in cuts]


def test_an_error_that_is_not_of_memory_is_not_repeated() -> None:
    calls = []

    def run(rows: slice, at_once: AtOnce) -> None:
        calls.append(rows)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_passes(run, 4, 10, batch_size=2, device="cpu", progress=lambda n: None)
    assert len(calls) == 1
