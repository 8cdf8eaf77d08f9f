"""What the benchmarks share: time of alternating runs, peak memory, matrix rates, the machine, tables and JSON.

Time is CPU time of the process (all its threads), which a busy machine disturbs far less than time on the wall; with a
GPU it is the time between two CUDA events.
"""

import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sae_transfer.study import git_state

GIT = git_state()  # of the code that runs, at its start
PACKAGES = ("torch", "transformers", "sae-lens", "transformer-lens", "numpy")


@dataclass(frozen=True)
class Spread:
    """One quantity measured several times: seconds of a side, or the ratio of two sides.

    Attributes:
        median: Of the runs.
        low: The least.
        high: The greatest.
        runs: Each, in order.
    """

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> "Spread":
        """Sum up several runs."""
        return cls(statistics.median(runs), min(runs), max(runs), tuple(runs))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """CPU seconds of one call; on a GPU, seconds between two events around it."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def alternating(
    sides: Mapping[str, Callable[[], object]], repeats: int, *, device: str = "cpu", warm_ups: int = 1
) -> dict[str, Spread]:
    """Run every side in turn, several times over, so that a change of the machine meets all of them alike.

    Args:
        sides: Name -> one run of it, start to end.
        repeats: Measured rounds.
        device: `cpu` or a CUDA device.
        warm_ups: Rounds before, not measured.

    Returns:
        Name -> seconds.
    """
    for _ in range(warm_ups):
        for run in sides.values():
            run()
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            runs[name].append(seconds(run, device))
    return {name: Spread.of(values) for name, values in runs.items()}


def ratio(slow: Spread, fast: Spread) -> Spread:
    """How many times longer the first side takes: round by round, so that its spread is that of the ratio."""
    return Spread.of([a / b for a, b in zip(slow.runs, fast.runs, strict=True)])


def extra_peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most memory one call holds beyond what stood before it, bytes; call it once before, for what is made once.

    Raises:
        OSError: Not on Linux, whose kernel keeps and resets the peak.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide as much of the run's own
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@cache
def matmul_seconds(m: int, k: int, n: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Measured seconds of one product `[m k] @ [k n]`, the median of several: the bound that fractions refer to."""
    # random: a GPU runs products of equal numbers at a higher clock
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    # small ones are all overhead, which a thousand show as well as any more
    repeats = min(max(1, int(2e10 / (2 * m * k * n))), 1000) if device == "cpu" else 20

    def several() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    several()
    return statistics.median(seconds(several, device) for _ in range(5)) / repeats


def machine() -> dict[str, Any]:
    """What the figures were measured on; names no host."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": sum(line.startswith("processor") for line in lines) or None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def say(text: str) -> None:
    """A line for the person who runs the benchmark."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results beside the machine, the day and the code that they were measured on."""

    def plain(value: Any) -> Any:
        return asdict(value) if isinstance(value, Spread) else str(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"machine": machine(), "date": str(datetime.now(UTC).date()), "git": GIT}
    text = json.dumps({**where, **results}, indent=2, default=plain)
    path.write_text(text + "\n", encoding="utf-8")
