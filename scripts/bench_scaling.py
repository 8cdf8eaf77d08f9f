"""How CPU time and peak memory grow with training tokens, width, number of SAEs and layers; and what `check` predicts.

    .venv/bin/python scripts/bench_scaling.py

A quarter of an hour for each repeat. Each point is one stage of a small study over random models, in a process of its
own on one core, the median of several. Writes scaling.json, scaling.png and scaling.svg into results/benchmarks/.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine, say, write_json
from small_studies import VERBS, carry_out, make_study, measured_core, on_one_core, say_agreement, start_up

from sae_transfer.cost.estimate import REALISED, estimate
from sae_transfer.cost.shape import model_shape
from sae_transfer.report.style import BLUE, VERMILLION, WIDE, Plot, legend_below, new_figure, plain_log, styled
from sae_transfer.study_file import load_study

GIB = 2**30
COLOURS = {"training": BLUE, "evaluation": VERMILLION}
# A wide residual stream through thin layers: a block of the stream is full after 131,072 tokens, and few are enough to
# see whether memory grows beyond it. So thin products run below a core's rate: `check` predicts too little time here.
WIDE_STREAM = {
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}
KEYS = {"saes.widths": [2048], "train.tokens": 65_536, "evaluate.tokens": 16_384}


def points(axis: str, value: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Model and study keys of a point on an axis."""
    if axis == "training tokens":
        return WIDE_STREAM, {**KEYS, "saes.widths": [64], "train.tokens": value}
    if axis == "width":
        return SMALL, {**KEYS, "saes.widths": [value]}
    if axis == "SAEs":
        return SMALL, {**KEYS, "saes.seeds": list(range(value))}
    return {**SMALL, "num_hidden_layers": value}, KEYS


AXES: dict[str, tuple[Sequence[int], Sequence[str]]] = {
    "training tokens": ((131_072, 262_144, 393_216), ("training",)),
    "width": ((1024, 4096, 16_384), ("training", "evaluation")),
    "SAEs": ((1, 2, 4), ("training", "evaluation")),
    "layers": ((2, 4, 8), ("training", "evaluation")),
}


def measure(axis: str, value: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The stages of one point, beside what `check` predicts of them from the rates that the core has at the time."""
    device = measured_core()
    with tempfile.TemporaryDirectory() as directory:
        path = make_study(Path(directory), *points(axis, value))
        config = json.loads((Path(directory) / "base" / "config.json").read_text(encoding="utf-8"))
        cost = estimate(load_study(path), model_shape(config), gpu=False)
        return [
            {
                "axis": axis,
                "value": value,
                "stage": stage.name,
                "gflops": 1000 * device.tflops_float32,
                "gbps": device.gbps,
                **asdict(carry_out(path, VERBS[stage.name])),
                "predicted_seconds": 3600 * stage.hours(device) / REALISED[1],
                "predicted_bytes": stage.memory.total,
            }
            for stage in cost.stages
            if stage.name in names
        ]


def median(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of several measurements of a point, the stages with median times, measured and predicted, and the most memory."""
    found = []
    for rows in zip(*runs, strict=True):
        times = [row["cpu_seconds"] for row in rows]
        spread = {
            "cpu_seconds": statistics.median(times),
            "cpu_seconds_low": min(times),
            "cpu_seconds_high": max(times),
            "predicted_seconds": statistics.median(row["predicted_seconds"] for row in rows),
        }
        found.append({**rows[0], **spread, "peak_bytes": max(row["peak_bytes"] for row in rows)})
    return found


def draw(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], machine_name: str) -> Plot:
    """Time above, memory below, an axis a column."""
    with styled():
        figure = new_figure(WIDE, 3.6)
        panels = figure.subplots(2, len(axes), squeeze=False)
        for panel in panels[0][1:]:
            panel.sharey(panels[0][0])
            panel.tick_params(labelleft=False)
        handles = []
        for column, axis in enumerate(axes):
            for name, colour in COLOURS.items():
                own = [row for row in rows if row["axis"] == axis and row["stage"] == name]
                if not own:
                    continue
                values = [row["value"] for row in own]
                for panel, measured, predicted, unit in (
                    (panels[0][column], "seconds", "predicted_seconds", 1),
                    (panels[1][column], "peak_bytes", "predicted_bytes", GIB),
                ):
                    (solid,) = panel.plot(values, [row[measured] / unit for row in own], "o-", color=colour, label=name)
                    (dashed,) = panel.plot(
                        values, [row[predicted] / unit for row in own], "--", color=colour, label=f"{name}, predicted"
                    )
                known = {handle.get_label() for handle in handles}
                handles += [handle for handle in (solid, dashed) if handle.get_label() not in known]
            measured_at = sorted({row["value"] for row in rows if row["axis"] == axis})
            for panel in panels[:, column]:
                panel.set_xscale("log")
                panel.set_xticks(
                    measured_at, [f"{value:,}" if value < 1e5 else f"{value / 1000:.0f}k" for value in measured_at]
                )
                panel.set_xticks([], minor=True)
            panels[1][column].set_xlabel(axis)
        plain_log(panels[0][0], "y")
        for panel in panels[1]:
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panels[0][0].set_ylabel("CPU seconds")
        panels[1][0].set_ylabel("Peak memory, GiB")
        legend_below(figure, handles)
    caption = f"CPU time without start-up, and peak resident memory, of one stage on one core ({machine_name})."
    return Plot("scaling", caption, figure)


def main() -> None:
    """Measure every point, write the figures."""
    parser = argparse.ArgumentParser(description="Cost against tokens, width, number of SAEs and layers.")
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES), help="Axes; unset: all.")
    parser.add_argument("--points", type=int, default=10, help="Points an axis, at most, from the smallest.")
    parser.add_argument("--repeats", type=int, default=3, help="Measurements of a point.")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    arguments = parser.parse_args()
    on_one_core()
    idle = start_up(COLOURS)
    rows: list[dict[str, Any]] = []
    for axis in arguments.only:
        values, names = AXES[axis]
        for value in values[: arguments.points]:
            for row in median([measure(axis, value, names) for _ in range(arguments.repeats)]):
                rows.append({**row, "seconds": row["cpu_seconds"] - idle[row["stage"]]})
                say(
                    f"{axis} {value:,}, {row['stage']}: {rows[-1]['seconds']:.1f} s"
                    f" (predicted {row['predicted_seconds']:.1f}), {row['peak_bytes'] / GIB:.2f} GiB"
                    f" (predicted {row['predicted_bytes'] / GIB:.2f})"
                )
    say_agreement(rows)
    found = {"repeats": arguments.repeats, "start_up_cpu_seconds": idle, "points": rows}
    write_json(arguments.out / "scaling.json", found)
    plot = draw(rows, arguments.only, machine()["cpu"])
    for path in plot.write(arguments.out):
        say(str(path))
    say(plot.caption)


if __name__ == "__main__":
    main()
