"""How far `sae-transfer check` is from what small studies really take, on one CPU core: memory and time of each stage.

    .venv/bin/python scripts/bench_check.py --json results/benchmarks/check.json

Measures the core's matrix rate and memory bandwidth, predicts studies of several shapes from them, carries each stage
out in a process of its own, and compares. Time is CPU time less that of a study with next to nothing to do, so that
imports do not count.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import say, table, write_json
from small_studies import TINY, VERBS, carry_out, make_study, measured_core, on_one_core, say_agreement, start_up

from sae_transfer.cost.device import Device
from sae_transfer.cost.estimate import REALISED, estimate
from sae_transfer.cost.shape import model_shape
from sae_transfer.study_file import load_study

GIB = 2**30
MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
# Shapes that pull the parts of a study apart: name -> model, keys of the study.
STUDIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "small": (TINY, {"saes.widths": [1024], "train.tokens": "200k", "evaluate.tokens": 49152}),
    "wide SAE": (TINY, {"saes.widths": [8192], "train.tokens": "100k", "evaluate.tokens": 16384}),
    "middle": (MIDDLE, {"saes.widths": [4096], "train.tokens": "60k", "evaluate.tokens": 8192}),
    "long context": (
        MIDDLE,
        {
            "saes.widths": [512],
            "train.tokens": "60k",
            "evaluate.tokens": 8192,
            "tokens.context_size": 1024,
            "evaluate.batch_size": 4,
        },
    ),
    "three SAEs": (MIDDLE, {"saes.widths": [1024, 2048, 4096], "train.tokens": "30k", "evaluate.tokens": 4096}),
    "topk": (
        TINY,
        {
            "saes.architecture": "topk",
            "saes.k": [16],
            "saes.widths": [4096],
            "train.tokens": "100k",
            "evaluate.tokens": 49152,
        },
    ),
    "wide vocabulary": (
        {**MIDDLE, "num_hidden_layers": 3, "vocab_size": 65536},
        {"saes.widths": [2048], "train.tokens": "50k", "evaluate.tokens": 4096},
    ),
}


def stages(name: str, device: Device) -> Iterator[dict[str, Any]]:
    """Prediction beside measurement, a stage at a time."""
    sizes, keys = STUDIES[name]
    with tempfile.TemporaryDirectory() as directory:
        path = make_study(Path(directory), sizes, keys)
        config = json.loads((Path(directory) / "base" / "config.json").read_text(encoding="utf-8"))
        for stage in estimate(load_study(path), model_shape(config), gpu=False).stages:
            yield {
                "stage": stage.name,
                **asdict(carry_out(path, VERBS[stage.name])),
                "bound_seconds": 3600 * stage.hours(device),
                "bound_parts": {part.name: part.seconds(device) for part in stage.parts},
                "predicted_bytes": stage.memory.total,
                "predicted_memory": asdict(stage.memory),
            }


def main() -> None:
    """Measure, predict, carry out, compare."""
    parser = argparse.ArgumentParser(description="Predicted against measured memory and time.")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="Studies; unset: all.")
    parser.add_argument("--json", type=Path, default=None, help="where the results are written")
    arguments = parser.parse_args()
    on_one_core()
    device = measured_core()
    say(f"one core: {device.tflops_float32 * 1000:.0f} GFLOP/s, {device.gbps:.1f} GB/s")
    idle = start_up(VERBS)
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        for row in stages(name, device):
            seconds = row["cpu_seconds"] - idle[row["stage"]]
            predicted = row["bound_seconds"] / REALISED[1]
            ratios = {"time_ratio": predicted / seconds, "memory_ratio": row["predicted_bytes"] / row["peak_bytes"]}
            rows.append({"study": name, **row, "seconds": seconds, "predicted_seconds": predicted, **ratios})
        say(f"{name}: done")
    header = ["study", "stage", "seconds", "predicted", "ratio", "realised", "GiB", "predicted", "ratio"]
    say(
        table(
            header,
            [
                [
                    *(row["study"], row["stage"], f"{row['seconds']:.1f}", f"{row['predicted_seconds']:.1f}"),
                    *(f"{row['time_ratio']:.2f}", f"{row['bound_seconds'] / row['seconds']:.2f}"),
                    *(f"{row['peak_bytes'] / GIB:.2f}", f"{row['predicted_bytes'] / GIB:.2f}"),
                    f"{row['memory_ratio']:.2f}",
                ]
                for row in rows
            ],
        )
    )
    say_agreement(rows)
    if arguments.json:
        write_json(arguments.json, {"device": asdict(device), "start_up_cpu_seconds": idle, "stages": rows})
        say(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
