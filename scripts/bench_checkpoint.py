"""What checkpoints cost: seconds to write and to read one, and the share of training time at the default interval.

    .venv/bin/python scripts/bench_checkpoint.py --d-in 1024 --widths 8192 32768 131072 --json checkpoint.json

The share is seconds of wall clock for one checkpoint (files written, hashed and synced, to the disk of --directory)
over `compute.checkpoint_every_min`. Beside it, what the disk alone takes for as many bytes, written and synced.
Resuming runs the present block of activations again, at most.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import machine, say, table, write_json
from sae_lens.config import SAETrainerConfig

from sae_transfer.config import Compute
from sae_transfer.saes.checkpoints import Checkpoints
from sae_transfer.saes.trainer import FastTrainer
from sae_transfer.saes.training import new_sae
from sae_transfer.study import sync


def trainer_of(d_in: int, width: int) -> FastTrainer:
    """A trainer after one step, so that the optimizer has its moments."""
    sae = new_sae(
        "standard",
        d_in=d_in,
        d_sae=width,
        sparsity_key="l1_coefficient",
        sparsity_value=1,
        seed=0,
        sparsity_warmup_steps=0,
        options={"apply_b_dec_to_input": False},
        metadata={},
        device="cpu",
    )
    config = SAETrainerConfig(
        total_training_samples=64,
        train_batch_size_samples=16,
        lr=1e-4,
        lr_end=1e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        device="cpu",
        autocast=False,
    )
    trainer = FastTrainer(config, sae)
    trainer.step(torch.randn(16, d_in, generator=torch.Generator().manual_seed(0)))
    trainer.n_training_steps += 1
    return trainer


def seconds(work: Callable[[], Any]) -> float:
    """Wall clock."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def measure(trainer: FastTrainer, directory: Path, repeats: int) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of each write, of each write of as many bytes by the disk alone, of each read; bytes of a checkpoint."""
    checkpoints = Checkpoints(directory, {"benchmark": 0})
    saved, plain, read = [], [], []
    content = torch.randn(2**24).numpy().tobytes()

    def write_plainly(n_bytes: int) -> None:
        path = directory / "plain"
        with path.open("wb") as file:
            for start in range(0, n_bytes, len(content)):
                file.write(content[: n_bytes - start])
        sync(path)
        path.unlink()

    def read_back() -> None:
        found = checkpoints.load(1)
        assert found is not None
        found.restore(trainer)

    n_bytes = 0
    for _ in range(repeats):
        checkpoints.remove_all()
        saved.append(seconds(lambda: checkpoints.save(trainer, 0, ())))
        read.append(seconds(read_back))
        n_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        plain.append(seconds(lambda n_bytes=n_bytes: write_plainly(n_bytes)))
    return saved, plain, read, n_bytes


def main() -> None:
    """Measure every width and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured; unset: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    interval = 60 * Compute().checkpoint_every_min
    rows = []
    for width in args.widths:
        with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
            saved, plain, read, n_bytes = measure(trainer_of(args.d_in, width), Path(scratch), args.repeats)
        rows.append(
            {
                "d_in": args.d_in,
                "width": width,
                "gib": n_bytes / 2**30,
                "save_seconds": median(saved),
                "save_seconds_min_max": [min(saved), max(saved)],
                "disk_alone_seconds": median(plain),
                "resume_seconds": median(read),
                "share_of_training": median(saved) / interval,
            }
        )
    shown = [
        [
            str(row["width"]),
            f"{row['gib']:.2f}",
            f"{row['save_seconds']:.1f} ({row['save_seconds_min_max'][0]:.1f} to {row['save_seconds_min_max'][1]:.1f})",
            f"{row['disk_alone_seconds']:.1f}",
            f"{row['resume_seconds']:.1f}",
            f"{row['share_of_training']:.2%}",
        ]
        for row in rows
    ]
    columns = ["width", "GiB", "save, s", "disk alone, s", "read back, s", f"of {interval / 60:g} min"]
    say(table(columns, shown))
    if args.json:
        write_json(args.json, {"machine": machine(), "interval_seconds": interval, "checkpoints": rows})


if __name__ == "__main__":
    main()
