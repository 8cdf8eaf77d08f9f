"""How far `sae-transfer check` is from what small studies really take, on one CPU core: memory and time of each stage.

    .venv/bin/python scripts/bench_check.py

Measures the core's matrix rate and memory bandwidth, predicts studies of several shapes from them, carries each stage
out in a process of its own, and compares. Time is CPU time less that of a study with next to nothing to do, so that
imports do not count. Writes results/benchmarks/check.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench import Spread, matmul_seconds, say, seconds, table, write_json
from transformers import LlamaConfig, LlamaForCausalLM

from sae_transfer.config import Study
from sae_transfer.cost.device import Device
from sae_transfer.cost.estimate import REALISED, estimate
from sae_transfer.cost.shape import model_shape
from sae_transfer.study_file import load_study

GIB = 2**30
# stage of the estimate -> verb that carries it out
VERBS = {"training": "train", "evaluation": "cross-eval", "outliers": "outliers"}
# Shapes that pull the parts of a study apart: name -> model, then keys of the study.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}
MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
WIDE_VOCABULARY = {**MIDDLE, "num_hidden_layers": 3, "vocab_size": 65536}
STUDIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "nothing": (SMALL, {"saes.widths": [64], "train.tokens": 2048, "evaluate.tokens": 1024}),
    "small": (SMALL, {"saes.widths": [1024], "train.tokens": "200k", "evaluate.tokens": 49152}),
    "wide SAE": (SMALL, {"saes.widths": [8192], "train.tokens": "100k", "evaluate.tokens": 32768}),
    "middle": (MIDDLE, {"saes.widths": [4096], "train.tokens": "60k", "evaluate.tokens": 16384}),
    "long context": (
        MIDDLE,
        {
            "saes.widths": [512],
            "train.tokens": "100k",
            "evaluate.tokens": 16384,
            "tokens.context_size": 1024,
            "evaluate.batch_size": 4,
        },
    ),
    "three SAEs": (MIDDLE, {"saes.widths": [1024, 2048, 4096], "train.tokens": "40k", "evaluate.tokens": 8192}),
    "wide vocabulary": (WIDE_VOCABULARY, {"saes.widths": [2048], "train.tokens": "50k", "evaluate.tokens": 8192}),
}


def measured_core() -> Device:
    """One core of this machine."""
    n = 2048
    rate = 2 * n**3 / matmul_seconds(n, n, n) / 1e12
    values = torch.ones(2**26)
    copy = torch.empty_like(values)
    values.add(1.0, alpha=1.0)
    n_bytes = 2 * 4 * values.numel()
    gbps = n_bytes / Spread.of([seconds(lambda: torch.add(values, 1.0, out=copy)) for _ in range(7)]).median / 1e9
    return Device(
        "one core of this machine", rate, rate, gbps, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    )


def make_study(directory: Path, name: str) -> Path:
    """A random pair, token ids and the study over them, on disk."""
    sizes, keys = STUDIES[name]
    for seed, side in enumerate(("base", "chat")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig.from_dict({**sizes, "tie_word_embeddings": False})).save_pretrained(
            directory / side
        )
    sections: dict[str, dict[str, Any]] = {
        "pair": {"base": str(directory / "base"), "chat": str(directory / "chat")},
        "site": {"layer": sizes["num_hidden_layers"] // 2, "hook": "resid_pre"},
        "tokens": {"dataset": str(directory / "ids.npy"), "context_size": 128},
        "saes": {},
        "train": {"batch_size": 1024, "scale_tokens": 2048, "models": ["base"], "lr": 1e-3},
        "evaluate": {"batch_size": 16, "outlier_threshold": 1000},
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


def carry_out(path: Path, verb: str) -> tuple[float, int]:
    """CPU seconds and peak resident bytes of one verb in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "sae_transfer",
        verb,
        str(path),
        "--out",
        str(path.parent / "run"),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def stages(path: Path, study: Study, device: Device) -> Iterator[dict[str, Any]]:
    """Prediction beside measurement, a stage at a time."""
    config = json.loads((Path(study.pair.base) / "config.json").read_text(encoding="utf-8"))
    cost = estimate(study, model_shape(config), gpu=False)
    for stage in cost.stages:
        cpu_seconds, peak = carry_out(path, VERBS[stage.name])
        bound = stage.hours(device) * 3600
        yield {
            "stage": stage.name,
            "cpu_seconds": cpu_seconds,
            "bound_seconds": bound,
            "parts_seconds": {part.name: part.seconds(device) for part in stage.parts},
            "peak_bytes": peak,
            "predicted_bytes": stage.memory.total,
            "memory": stage.memory,
        }


def main() -> None:
    """Measure, predict, carry out, compare."""
    parser = argparse.ArgumentParser(description="Predicted against measured memory and time.")
    parser.add_argument("--only", nargs="*", choices=[name for name in STUDIES if name != "nothing"])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/check.json"))
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    device = measured_core()
    say(f"one core: {device.tflops_float32 * 1000:.0f} GFLOP/s, {device.gbps:.1f} GB/s")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ["nothing", *(arguments.only or [n for n in STUDIES if n != "nothing"])]:
        with tempfile.TemporaryDirectory() as directory:
            path = make_study(Path(directory), name)
            found[name] = list(stages(path, load_study(path), device))
        say(f"{name}: done")
    start_up = {row["stage"]: row["cpu_seconds"] for row in found.pop("nothing")}
    rows = []
    for name, results in found.items():
        for row in results:
            row["work_seconds"] = row["cpu_seconds"] - start_up[row["stage"]]
            row["time_ratio"] = row["bound_seconds"] / REALISED[1] / row["work_seconds"]
            row["memory_ratio"] = row["predicted_bytes"] / row["peak_bytes"]
            rows.append(
                [
                    *(name, row["stage"], f"{row['work_seconds']:.1f}", f"{row['bound_seconds'] / REALISED[1]:.1f}"),
                    *(f"{row['time_ratio']:.2f}", f"{row['bound_seconds'] / row['work_seconds']:.2f}"),
                    *(
                        f"{row['peak_bytes'] / GIB:.2f}",
                        f"{row['predicted_bytes'] / GIB:.2f}",
                        f"{row['memory_ratio']:.2f}",
                    ),
                ]
            )
    header = ["study", "stage", "seconds", "predicted", "ratio", "realised", "GiB", "predicted", "ratio"]
    say(table(header, rows))
    for key, allowed in (("time_ratio", 0.5), ("memory_ratio", 0.25)):
        ratios = [row[key] for results in found.values() for row in results]
        n_within = sum(abs(ratio - 1) <= allowed for ratio in ratios)
        say(f"{key}: {min(ratios):.2f} to {max(ratios):.2f}; within {allowed:.0%}: {n_within} of {len(ratios)}")
    write_json(arguments.out, {"device": vars(device), "start_up_cpu_seconds": start_up, "studies": found})


if __name__ == "__main__":
    main()
