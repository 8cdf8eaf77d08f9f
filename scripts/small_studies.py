"""Studies over random models, made on disk and carried out stage by stage in processes of their own, measured."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench import matmul_seconds, say, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from sae_transfer.cost.device import Device
from sae_transfer.study_file import load_study

# stage of the estimate -> verb that carries it out
VERBS = {"training": "train", "evaluation": "cross-eval", "outliers": "outliers"}
# What is measured -> what is predicted of it, and how far off that may be.
PREDICTED = {"seconds": ("predicted_seconds", 0.5), "peak_bytes": ("predicted_bytes", 0.25)}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}
# A study with next to nothing to do.
NOTHING = {"saes.widths": [64], "train.tokens": 2048, "evaluate.tokens": 1024}
# What a child runs. It reads its own peak: the one that its parent is told (ru_maxrss) is never less than the parent's.
CHILD = """
import atexit, os, pathlib
def write_peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    pathlib.Path(os.environ["PEAK_FILE"]).write_text(kib)
atexit.register(write_peak)
from sae_transfer.cli import main
main()
"""


@dataclass(frozen=True)
class Taken:
    """What one stage took.

    Attributes:
        cpu_seconds: Of the process, imports included.
        peak_bytes: Most resident memory.
    """

    cpu_seconds: float
    peak_bytes: int


def measured_core() -> Device:
    """One core of this machine: rates that a large product and a large copy have now, and all memory."""
    n = 2048
    matmul_seconds.cache_clear()
    rate = 2 * n**3 / matmul_seconds(n, n, n) / 1e12
    values = torch.ones(2**26)
    copy = torch.empty_like(values)
    torch.add(values, 1.0, out=copy)
    taken = sorted(seconds(lambda: torch.add(values, 1.0, out=copy)) for _ in range(7))[3]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Device("one core of this machine", rate, rate, 2 * 4 * values.numel() / taken / 1e9, gib)


def on_one_core() -> None:
    """Keep this process, and those it starts, on one core and one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def make_study(directory: Path, sizes: Mapping[str, int], keys: Mapping[str, Any]) -> Path:
    """Write a random Llama pair, token ids and a study over them.

    Args:
        directory: Where to.
        sizes: Fields of the model's configuration.
        keys: Of the study, dotted, beside those that are the same for all.

    Returns:
        The study file.
    """
    for seed, side in enumerate(("base", "chat")):
        torch.manual_seed(seed)
        config = LlamaConfig.from_dict({**sizes, "tie_word_embeddings": False})
        LlamaForCausalLM(config).save_pretrained(directory / side)
    sections: dict[str, dict[str, Any]] = {
        "pair": {"base": str(directory / "base"), "chat": str(directory / "chat")},
        "site": {"layer": sizes["num_hidden_layers"] // 2, "hook": "resid_pre"},
        "tokens": {"dataset": str(directory / "ids.npy"), "context_size": 128},
        "saes": {},
        "train": {"batch_size": 1024, "scale_tokens": 2048, "models": ["base"], "lr": 1e-3},
        # a scaled norm is about sqrt(d_model): some positions of each batch are above, so that no two passes are equal
        "evaluate": {"batch_size": 16, "outlier_threshold": 1.05 * sizes["hidden_size"] ** 0.5},
    }
    for key, value in keys.items():
        section, _, field = key.partition(".")
        sections[section][field] = value
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    (directory / "ids.npy").touch()  # a study's dataset must be there to be read
    study = load_study(path)
    context = study.tokens.context_size
    n_rows = -(-(study.evaluate.tokens + study.n_training_tokens) // context) + 2
    ids = np.random.default_rng(0).integers(sizes["vocab_size"], size=(n_rows, context), dtype=np.int32)
    np.save(directory / "ids.npy", ids)
    return path


def start_up(stages: Iterable[str]) -> dict[str, float]:
    """CPU seconds of each stage, a key of `VERBS`, with next to nothing to do, median of three: most of it imports."""
    taken: dict[str, list[float]] = {stage: [] for stage in stages}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            path = make_study(Path(directory), TINY, NOTHING)
            for stage, seconds_of in taken.items():
                seconds_of.append(carry_out(path, VERBS[stage]).cpu_seconds)
    return {stage: statistics.median(seconds_of) for stage, seconds_of in taken.items()}


def say_agreement(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say how far the predictions of stages lie from what was measured; each row has all keys of `PREDICTED`."""
    for measured, (predicted, allowed) in PREDICTED.items():
        ratios = [row[predicted] / row[measured] for row in rows]
        n_within = sum(abs(value - 1) <= allowed for value in ratios)
        text = f"{min(ratios):.2f} to {max(ratios):.2f}; within {allowed:.0%}: {n_within} of {len(ratios)}"
        say(f"{predicted} over {measured}: {text}")


def carry_out(path: Path, verb: str) -> Taken:
    """One verb on the CPU, in a process of its own."""
    out, peak = path.parent / "run", path.parent / "peak"
    arguments = [verb, str(path), "--out", str(out), "--device", "cpu"]
    command = [sys.executable, "-c", CHILD, *arguments]
    environment = {**os.environ, "PEAK_FILE": str(peak)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"sae-transfer {' '.join(arguments)}\n{said}")
    return Taken(usage.ru_utime + usage.ru_stime, int(peak.read_text(encoding="utf-8")) * 1024)
