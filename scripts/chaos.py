"""Kill a small study at random moments in every stage, resume it, and compare with one that was left alone.

    .venv/bin/python scripts/chaos.py --rounds 100 --each 20 --seed 0

A round is one kill: SIGKILL mostly, sometimes a signal that asks to stop, and now and then the newest checkpoint is
damaged as well. Several rounds fall on one run directory, from its first stage to its last. At its end every file must
be, byte for byte, that of the run that was left alone. Exit code 1 when anything is lost or different.
"""

import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")

import typer
import yaml
from rich.console import Console
from rich.table import Table

from sae_transfer import cli
from sae_transfer.signals import STOPPING

# Once, here: a run is then a fork of this process and starts at once, instead of after ten seconds.
importlib.import_module("sae_transfer.pipeline")

STUDY = {
    "pair": {"base": "demo:base", "chat": "demo:chat"},
    "site": {"layer": 2, "hook": "resid_pre"},
    "tokens": {"dataset": "demo:text", "context_size": 128},
    "saes": [
        {"architecture": "standard", "widths": [192], "l1_coefficient": [2]},
        {"architecture": "topk", "widths": [192], "k": [16]},
    ],
    "train": {"tokens": "24k", "batch_size": 128, "lr": 1e-3, "scale_tokens": "24k"},
    "finetune": {"tokens": ["8k"], "batch_size": 128},
    "evaluate": {"tokens": 4096, "batch_size": 16, "outlier_threshold": 25},
    "instruct": {"dataset": "demo:instructions", "n": 8, "max_new_tokens": 16},
    "compute": {"device": "cpu", "checkpoint_every_min": 0.003},
}
# In order; a stage is done when it has a record. The report has none, and is done when the process is.
STAGES = (
    *("tokens", "scales", "train-base", "train-chat", "finetune", "cross-eval"),
    *("outliers", "rollouts", "instruct", "weights", "report"),
)
TRAINED = {"train-base": "base-", "train-chat": "chat-", "finetune": "finetuned-"}
PLACES = {
    "tokens/": "tokens",
    "scales.json": "scales",
    **{f"saes/{prefix}": stage for stage, prefix in TRAINED.items()},
    "cross_eval/": "cross-eval",
    "outliers/": "outliers",
    "instruct/rollouts": "rollouts",
    "instruct/": "instruct",
    "weights/": "weights",
    "report/": "report",
}
SIGNALS = [signal.SIGKILL] * 7 + [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT]
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGUSR2: 75, signal.SIGINT: 130}
DAMAGED = 0.5  # of the deaths in training
POLL_S, LIMIT_S = 0.01, 600
LONGEST_S = 3.0  # from the start of a stage to its kill
HEEDED_WITHIN_S = 5.0  # of a signal: a batch, or a step and its checkpoint


@dataclass
class Count:
    """What happened to one stage."""

    kills: int = 0
    damaged: int = 0
    resumed: int = 0
    lost: int = 0
    different: int = 0


class Run:
    """`sae-transfer run` in a process of its own."""

    def __init__(self, study: Path, root: Path) -> None:
        """Start it; what it says goes to a file beside the run directory."""
        self._root = root
        self.output = root.with_suffix(".out")
        self.output.write_text("")  # what an earlier process said is not this one's
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self._pid = os.fork()
        if self._pid == 0:
            for number in STOPPING:  # until the command has handlers of its own, when nothing has begun
                signal.signal(number, lambda number, _: os._exit(EXIT_CODES[signal.Signals(number)]))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            with self.output.open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            sys.argv = ["sae-transfer", "run", str(study), "--out", str(root)]
            code = 1
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def wait(self, until: str | None = None) -> int | None:
        """Wait for the end, whose exit code comes back; or until a stage is at work, which gives None."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if until is not None and stage_of(self._root) == until:
                return None
            time.sleep(POLL_S)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        raise TimeoutError(f"{self._root}: no end after {LIMIT_S} s")

    def kill(self, number: int) -> int:
        """Send a signal to the process, which has not been waited for, and wait for its end."""
        os.kill(self._pid, number)
        code = self.wait()
        assert code is not None
        return code


def stage_of(root: Path) -> str:
    """The stage that a run is at."""
    return next((stage for stage in STAGES if not (root / "stages" / f"{stage}.json").exists()), STAGES[-1])


def records(root: Path) -> dict[str, str]:
    """The records of finished stages."""
    return {path.stem: path.read_text() for path in (root / "stages").glob("*.json")}


def checkpointed(root: Path) -> set[str]:
    """SAEs that have a checkpoint."""
    return {path.parent.parent.name for path in root.glob("saes/*/checkpoints/[0-9]*")}


def damage(root: Path, rng: random.Random) -> bool:
    """Flip a byte of one SAE's newest checkpoint, or cut it short; False if there are not two."""
    candidates = [path for path in root.glob("saes/*/checkpoints") if len(list(path.glob("[0-9]*"))) > 1]
    if not candidates:
        return False
    newest = max(rng.choice(sorted(candidates)).glob("[0-9]*"), key=lambda path: int(path.name))
    file = rng.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    file.write_bytes(content)
    return True


def contents(root: Path) -> dict[str, bytes]:
    """All files of a run but for what says when, where and how it ran: log, locks, manifest, page, times of stages."""
    left_out = {"log.txt", "log.txt.1", "manifest.json", "report/index.html"}
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and name not in left_out and not name.startswith(".lock"):
            found[name] = path.read_bytes()
            if name.startswith("stages/"):
                found[name] = json.dumps(json.loads(found[name])["inputs"], sort_keys=True).encode()
    return found


def differences(root: Path, reference: Path) -> dict[str, list[str]]:
    """Files that differ, or that only one has, by the stage that makes them."""
    ours, theirs = contents(root), contents(reference)
    found: dict[str, list[str]] = {}
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            stage = next((stage for place, stage in PLACES.items() if name.startswith(place)), None)
            found.setdefault(stage or Path(name).stem, []).append(name)
    return found


def campaign(out: Path, rounds: int, each: int, rng: random.Random) -> Iterator[dict[str, Count]]:
    """Kill in every stage until there are `rounds`, then in the stages that were hit less than `each` times.

    Yields the counts by stage after every run directory.
    """
    console = Console(stderr=True)
    study, reference = out / "chaos.yaml", out / "reference"
    study.write_text(yaml.safe_dump(STUDY))
    started = time.monotonic()
    if code := Run(study, reference).wait():
        raise RuntimeError(f"the reference ended with {code}: {reference.with_suffix('.out').read_text()}")
    console.print(f"reference: {time.monotonic() - started:.0f} s")
    lasts = {stage: json.loads(text)["seconds"] for stage, text in records(reference).items()}
    counts = {stage: Count() for stage in STAGES}
    n_rounds = 0
    for index in itertools.count():
        thin = tuple(stage for stage in STAGES if counts[stage].kills < each)
        if n_rounds >= rounds and not thin:
            return
        goal = rounds if n_rounds < rounds else sys.maxsize
        root = out / f"run{index}"
        killed: set[str] = set()
        for target in STAGES if n_rounds < rounds else thin:
            for _ in range(rng.choice((1, 2, 3, 4)) if rounds > len(STAGES) else 1):
                if n_rounds < goal and STAGES.index(stage_of(root)) <= STAGES.index(target):
                    # a stage that is still to be hit is short: its kill comes early, or falls on the next one
                    longest = LONGEST_S if n_rounds < rounds else 0.1
                    hit = one_round(root, study, target, lasts.get(target, 1.0), longest, rng, counts, console)
                    killed |= {hit} if hit else set()
                    n_rounds += hit is not None
        n_lost = finish(root, study, console)
        differ = differences(root, reference)
        for stage in killed:
            counts[stage].lost += n_lost
            counts[stage].different += stage in differ
        for stage, names in differ.items():
            counts.setdefault(stage, Count()).different += stage not in killed
            console.print(f"run{index}: different in {stage}: {', '.join(names)}", style="red")
        if not differ and not n_lost:
            shutil.rmtree(root)
        fewest = min(counts[stage].kills for stage in STAGES)
        took = time.monotonic() - started
        console.print(f"run{index}: {n_rounds} of {rounds} rounds, {fewest} in the least hit stage, {took:.0f} s")
        yield counts


def one_round(
    root: Path,
    study: Path,
    target: str,
    lasts: float,
    longest: float,
    rng: random.Random,
    counts: dict[str, Count],
    console: Console,
) -> str | None:
    """One kill, aimed at a stage; gives the stage that it hit, None if the run was over before."""
    before, saved = records(root), checkpointed(root)
    run = Run(study, root)
    code = run.wait(target)
    if code == 0:
        return None  # it was over before
    number, delay = rng.choice(SIGNALS), rng.random() * min(lasts, longest)
    took = 0.0
    if code is None:
        time.sleep(delay)
        sent = time.time()
        code = run.kill(number)
        took = time.time() - sent
        if code == 0 and run.output.stat().st_mtime <= sent:
            return None  # it had said all when the signal came
    stage = stage_of(root)
    count = counts[stage]
    count.kills += 1
    said = run.output.read_text()
    problem = ""
    if code != EXIT_CODES[number]:
        problem = f"ended with {code} after {signal.Signals(number).name}: {said}"
    elif took > HEEDED_WITHIN_S:
        problem = f"heeded {signal.Signals(number).name} after {took:.1f} s: {said}"
    elif any(records(root).get(name) != text for name, text in before.items()):
        problem = "a finished stage was done again"
    elif lost := {s for s in saved if f"{s}: going on from" not in said and f"{s}: trained already" not in said}:
        # killed before its turn came, it has not lost its checkpoint
        problem = f"checkpoints of {', '.join(lost)} were not used" if lost - checkpointed(root) - stored(root) else ""
    if problem:
        count.lost += 1
        console.print(f"{root.name}, {stage}: {problem}", style="red")
    else:
        count.resumed += 1
    if stage in TRAINED and rng.random() < DAMAGED:
        count.damaged += damage(root, rng)
    return stage


def stored(root: Path) -> set[str]:
    """SAEs that are stored."""
    return {path.parent.name for path in root.glob("saes/*/provenance.json")}


def finish(root: Path, study: Path, console: Console) -> int:
    """Let the run end; gives 1 if it does not, or does not go on from every checkpoint."""
    saved = checkpointed(root)
    run = Run(study, root)
    code, said = run.wait(), run.output.read_text()
    unused = {name for name in saved if f"{name}: going on from" not in said and f"{name}: trained already" not in said}
    if code or unused:
        console.print(f"{root.name}: ended with {code}; not used: {unused or 'none'}: {said}", style="red")
    return int(bool(code or unused))


def table_of(counts: dict[str, Count]) -> Table:
    """The counts as they are shown."""
    table = Table("stage", *asdict(Count()))
    for stage, count in counts.items():
        table.add_row(stage, *map(str, asdict(count).values()))
    return table


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Kills in all, at least.")] = 100,
    each: Annotated[int, typer.Option(min=0, help="Kills that hit each stage, at least.")] = 0,
    seed: Annotated[int, typer.Option(help="Draws stages, moments and signals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the runs go; unset: a temporary directory.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the counts there.")] = None,
) -> None:
    """Kill a small study at random moments in every stage, resume it, and compare with one that was left alone."""
    started = time.monotonic()
    place = out or Path(tempfile.mkdtemp(prefix="chaos-"))
    place.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Count] = {}
    for counts in campaign(place, rounds, each, random.Random(seed)):
        if json_ is not None:
            result = {"rounds": sum(c.kills for c in counts.values()), "seed": seed}
            result |= {"seconds": round(time.monotonic() - started)}
            json_.write_text(json.dumps({**result, "stages": {s: asdict(c) for s, c in counts.items()}}, indent=2))
    Console().print(table_of(counts))
    is_bad = any(count.lost or count.different for count in counts.values())
    if out is None and not is_bad:
        shutil.rmtree(place)
    raise typer.Exit(int(is_bad))


if __name__ == "__main__":
    typer.run(main)
