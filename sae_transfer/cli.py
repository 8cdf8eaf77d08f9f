"""The verbs: parse, one call, print the path of what was written. No logic; heavy imports happen inside a verb."""

import gc
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sae_transfer import __version__, demo, signals
from sae_transfer.config import Study, json_schema
from sae_transfer.console import ConsoleHandler
from sae_transfer.cost.device import choose_device
from sae_transfer.errors import StudyError
from sae_transfer.redaction import redacted
from sae_transfer.study_file import load_study

if TYPE_CHECKING:
    from sae_transfer.sweep.run import Status

EXIT_BUG, EXIT_MENDABLE = 1, 2
KEPT = "finished stages are kept, and the checkpoints of a training; the same command goes on"
WATCH_EVERY_S = 5.0
STATUS_WIDTH = 150  # characters
WIDER_THAN_ANY_TABLE = 10_000

app = typer.Typer(
    help="Does a sparse autoencoder trained on a base model work on its chat model, and the other way round?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The study file (YAML).", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the study file, e.g. evaluate.tokens=8192."),
]
Configs = Annotated[
    list[Path], typer.Argument(metavar="CONFIG...", help="The study file (YAML); several train on one stream.")
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory; unset: results/<name>.")]
Here = Annotated[
    bool,
    typer.Option("--here", help="The run directory is the one that the study file lies in, as RUN/study.yaml does."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; unset: compute.device of the study.")]
Force = Annotated[bool, typer.Option("--force", help="Do a stage again whose inputs changed.")]
RetryLR = Annotated[
    float | None,
    typer.Option(
        "--retry-lr",
        metavar="X",
        help="After a blow-up: all trainings that have checkpoints go on from them with peak learning rate X.",
    ),
]

On = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Estimate for h200, h100, a100-80, ... or cpu; unset: h100, or cpu if the study asks for it.",
    ),
]
DeviceSpec = Annotated[
    str | None, typer.Option(metavar="FIGURES", help="Another one: tflops=790,tflops_float32=54,gbps=4300,gib=141.")
]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(name="demo")
def run_demo(set_: Set = None, out: Out = None, device: Device = None, force: Force = False) -> None:
    """The whole study on the embedded pair; CPU, a few minutes.

    Example: sae-transfer demo
    """
    study = _study(demo.STUDY, set_, device)
    _run(study, _root(study, out), None, force)


@app.command()
def check(
    config: Config,
    set_: Set = None,
    on: On = None,
    device_spec: DeviceSpec = None,
) -> None:
    """Say everything that is wrong with a study, what it will do and what it costs; no weights are loaded.

    Example: sae-transfer check configs/demo.yaml --on cpu
    """
    from sae_transfer.plan import describe

    study = _study(config, set_, None)
    device, gpu = choose_device(on, device_spec, asked=study.compute.device)
    for line in describe(study, device, gpu=gpu):
        typer.echo(line)


@app.command()
def run(
    config: Config,
    set_: Set = None,
    out: Out = None,
    here: Here = False,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Only this stage, e.g. cross-eval; may be given several times. Unset: all, in order."),
    ] = None,
    device: Device = None,
    force: Force = False,
    retry_lr: RetryLR = None,
) -> None:
    """Every stage that is not yet done, then the report.

    Example: sae-transfer run configs/demo.yaml --set evaluate.tokens=8192 --out results/small
    """
    study = _study(config, set_, device)
    _run(study, _root(study, out, config if here else None), stage, force, retry_lr)


@app.command()
def train(
    configs: Configs,
    set_: Set = None,
    out: Out = None,
    here: Here = False,
    model: Annotated[
        str | None,
        typer.Option(help="base or chat: only its SAEs; another process may train the other's. Unset: train.models."),
    ] = None,
    device: Device = None,
    force: Force = False,
    retry_lr: RetryLR = None,
) -> None:
    """Train the SAEs of both models.

    Example: sae-transfer train configs/demo.yaml --set saes.widths=[512,1024]
    """
    if model not in (None, "base", "chat"):
        raise StudyError(f"--model: got {model}; expected base or chat")
    _train(configs, "train", set_, out, here, device, force, retry_lr, model)


@app.command()
def finetune(
    configs: Configs,
    set_: Set = None,
    out: Out = None,
    here: Here = False,
    device: Device = None,
    force: Force = False,
    retry_lr: RetryLR = None,
) -> None:
    """Continue the base SAEs on the chat model's activations.

    Example: sae-transfer finetune configs/demo.yaml --set finetune.tokens=[20k]
    """
    _train(configs, "finetune", set_, out, here, device, force, retry_lr, None)


@app.command()
def cross_eval(
    config: Config, set_: Set = None, out: Out = None, here: Here = False, device: Device = None, force: Force = False
) -> None:
    """Evaluate every SAE on both models and print the table.

    Example: sae-transfer cross-eval configs/demo.yaml --set "evaluate.scale=[matched, raw]"
    """
    study = _study(config, set_, device)
    _run(study, _root(study, out, config if here else None), "cross-eval", force)


@app.command()
def outliers(
    config: Config, set_: Set = None, out: Out = None, here: Here = False, device: Device = None, force: Force = False
) -> None:
    """Norms over the evaluation tokens, what the outliers are, and what depends on the threshold.

    Example: sae-transfer outliers configs/demo.yaml
    """
    study = _study(config, set_, device)
    _run(study, _root(study, out, config if here else None), "outliers", force)


@app.command()
def instruct(
    config: Config, set_: Set = None, out: Out = None, here: Here = False, device: Device = None, force: Force = False
) -> None:
    """Evaluate the SAEs on instructions and the chat model's own answers.

    Example: sae-transfer instruct configs/demo.yaml --set instruct.n=20
    """
    study = _study(config, set_, device)
    _run(study, _root(study, out, config if here else None), "instruct", force)


@app.command()
def weights(
    config: Config, set_: Set = None, out: Out = None, here: Here = False, device: Device = None, force: Force = False
) -> None:
    """Compare the two models' weights, and their activations at the site.

    Example: sae-transfer weights configs/demo.yaml
    """
    study = _study(config, set_, device)
    _run(study, _root(study, out, config if here else None), "weights", force)


@app.command()
def report(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The study file (YAML), or a sweep's directory.")],
    set_: Set = None,
    out: Out = None,
    here: Here = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Another run directory, to draw the weight differences of both in one figure."
        ),
    ] = None,
) -> None:
    """Write tables, figures and the page from the results that are there.

    Example: sae-transfer report configs/gemma-2b.yaml --beside results/mistral-7b --beside results/qwen1.5-0.5b
    """
    from sae_transfer.report.page import write_report
    from sae_transfer.report.weight_figures import write_weights_of
    from sae_transfer.sweep.run import cells_for_report, is_sweep

    if is_sweep(config):
        from sae_transfer.report.sweep import write_sweep_report

        states = {cell.id: (cell.state, cell.message) for cell in cells_for_report(config)}
        typer.echo(write_sweep_report(config, states))
        return
    root = _root(_study(config, set_, None), out, config if here else None)
    page = write_report(root)
    if beside:
        typer.echo(write_weights_of([root, *beside]))
    typer.echo(page)


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(help="SAE directory, SAELens release, hub repository or wandb artifact.")],
    directory: Annotated[Path, typer.Argument(help="Where to; new or empty.")],
    sae_id: Annotated[str | None, typer.Option("--id", help="Of a SAELens release.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="It expects activations times this, and is folded; unset: it takes raw ones.")
    ] = None,
) -> None:
    """Bring an SAE from elsewhere into our form: folded, float32, ready for SAE.load_from_disk.

    Example: sae-transfer import gemma-2b-res-jb saes/gemma --id blocks.12.hook_resid_post
    """
    from sae_transfer.saes.exchange import import_sae

    import_sae(source, directory, sae_id=sae_id, scale=scale)
    typer.echo(directory)


@app.command()
def push(
    sae: Annotated[Path, typer.Argument(help="An SAE of a run: results/NAME/saes/ID.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, org/name.")],
) -> None:
    """Upload an SAE of a run to the hub, with its table as model card.

    Example: sae-transfer push results/demo/saes/base-standard-w1024-l1_2-s0 me/demo-sae
    """
    from sae_transfer.saes.exchange import push_sae

    typer.echo(push_sae(sae, repository))


@app.command()
def schema() -> None:
    """Print the JSON schema of a study file, for editors that complete and check YAML.

    Example: sae-transfer schema > study.schema.json
    """
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def sweep(
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep file (YAML).", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The sweep's directory.", show_default=False)],
    set_: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the jobs and what each will cost; submit none.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until every job has ended.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also jobs that failed, or have used launcher.max_attempts.")
    ] = False,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Jobs at once of the engine local; unset: launcher.slots, else one a GPU.")
    ] = None,
    on: On = None,
    device_spec: DeviceSpec = None,
) -> None:
    """A grid of studies as jobs, on SLURM or this machine; again, it submits only what is neither done nor live.

    Example: sae-transfer sweep configs/sweeps/demo.yaml --out results/demo-sweep --wait
    """
    from sae_transfer.sweep import run as sweeps

    if dry_run:
        device, gpu = choose_device(on, device_spec, asked="auto")
        for line in sweeps.describe(sweep_file, out, set_ or (), device, gpu=gpu):
            typer.echo(line)
        return
    sweeps.submit_sweep(sweep_file, out, set_ or (), retry_failed=retry_failed, slots=slots, foreground=wait)
    if not wait:
        typer.echo(f"sae-transfer status {out}")
        return
    found = sweeps.wait(out)
    _print_status(found)
    typer.echo(out / "report" / "index.html")
    if missing := len(found.cells) - found.counts["done"]:
        raise StudyError(
            f"{out}: {missing} of {len(found.cells)} cells are not done",
            "mend what the table says, then the same command; --retry-failed for what failed",
        )


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's directory.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: counts by state, and every cell.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and print what changes until nothing is live.")] = False,
) -> None:
    """Where every cell of a sweep is: our own files, corrected by what SLURM says.

    Example: sae-transfer status results/demo-sweep --watch
    """
    from sae_transfer.sweep import run as sweeps

    shown = None
    while True:
        found = sweeps.read_status(directory)
        if found != shown:
            shown = found
            if as_json:
                typer.echo(json.dumps(found.as_json(), indent=2))
            else:
                _print_status(found)
        if not watch or not found.is_live:
            return
        time.sleep(WATCH_EVERY_S)
        signals.check()


@app.command()
def cancel(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's directory.", show_default=False)],
) -> None:
    """Cancel a sweep's jobs; those that run write a checkpoint first, and the same sweep command goes on from it.

    Example: sae-transfer cancel results/demo-sweep
    """
    from sae_transfer.sweep.run import cancel_sweep

    typer.echo(f"{cancel_sweep(directory)} jobs cancelled")


def _print_status(status: "Status") -> None:
    # ids are what a person copies, so they are never cut
    console = Console(width=max(Console().width, STATUS_WIDTH))
    table = Table(box=SIMPLE_HEAD)
    for column in ("cell", "state", "stage", "message"):
        table.add_column(column, overflow="fold", no_wrap=column == "cell")
    for cell in status.cells:
        table.add_row(escape(cell.id), cell.state, cell.stage, escape(cell.message))
    console.print(table)
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
    console.print(f"{counts}; combined report: {status.report}", highlight=False)


def _study(config: Path, overrides: list[str] | None, device: str | None) -> Study:
    return load_study(config, [*(overrides or []), *([f"compute.device={device}"] if device else [])])


def _root(study: Study, out: Path | None, beside: Path | None = None) -> Path:
    """The run directory: the one that the file `beside` lies in, else `out`, else by the study's name."""
    if beside and out:
        raise StudyError("--here and --out both name the run directory", "leave one of them out")
    return beside.absolute().parent if beside else out or Path("results") / study.name


def _run(
    study: Study, root: Path, stages: Sequence[str] | str | None, force: bool, retry_lr: float | None = None
) -> None:
    """Carry out one stage, some, or all; print the post's table if it was made, and the path of what was written."""
    with _imports():
        from sae_transfer.pipeline import STAGES, run_stages

    stages = STAGES if not stages else (stages,) if isinstance(stages, str) else stages
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise StudyError(f"--stage: got {unknown[0]}; expected one of {', '.join(STAGES)}")
    with _interruptible():
        run_stages(study, root, [stage for stage in STAGES if stage in stages], force=force, retry_lr=retry_lr)
    if "cross-eval" in stages:
        _print_tables(root)
    if "report" in stages:
        typer.echo(root / "report" / "index.html")
    else:
        typer.echo(root / "saes" if stages[-1] in ("train", "finetune") else root / stages[-1].replace("-", "_"))


def _train(
    configs: list[Path],
    stage: str,
    set_: list[str] | None,
    out: Path | None,
    here: bool,
    device: str | None,
    force: bool,
    retry_lr: float | None,
    side: str | None,
) -> None:
    """Train or fine-tune the SAEs of one study, or of several on one stream; print where they are."""
    with _imports():
        from sae_transfer.pipeline import train_together

    if len(configs) > 1 and not here:
        raise StudyError("several study files need a run directory each", "put each into its own, and add --here")
    studies = {}
    for config in configs:
        study = _study(config, set_, device)
        studies[_root(study, out, config if here else None)] = study
    if len(studies) < len(configs):
        raise StudyError("two of the study files lie in one run directory", "one study file a run directory")
    with _interruptible():
        train_together(studies, stage, side=side, force=force, retry_lr=retry_lr)
    for root in studies:
        typer.echo(root / "saes")


@contextmanager
def _imports() -> Iterator[None]:
    """Import what stays: garbage collections look at none of it, now (a sixth of the time it takes) or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:  # here, because Typer turns it into an exit without a word
        logging.getLogger("sae_transfer").error("interrupted; %s", KEPT)
        raise typer.Exit(signals.EXIT_INTERRUPTED) from None


def _print_tables(root: Path) -> None:
    from sae_transfer.report.tables import cross_eval_blocks

    # numbers cut short would be wrong numbers: a narrow terminal wraps the lines instead
    console = Console(width=WIDER_THAN_ANY_TABLE)
    for block in cross_eval_blocks(root):
        console.print(block.title, markup=False, highlight=False, soft_wrap=True)
        table = Table(box=SIMPLE_HEAD)
        for column in block.table.columns:
            table.add_column(column, justify="left" if column in ("SAE", "Model") else "right", no_wrap=True)
        for row in block.table.itertuples(index=False):
            table.add_row(*row)
        console.print(table)


@contextmanager
def _logging() -> Iterator[None]:
    logger = logging.getLogger("sae_transfer")
    logger.setLevel(logging.INFO)
    handler = ConsoleHandler(Console(stderr=True))
    logger.addHandler(handler)
    try:
        yield
    finally:
        handler.close()
        logger.removeHandler(handler)


def main() -> None:
    """Run the CLI; exit codes: 0, 1 a bug, 2 what the user can mend, 75 stopped by a signal, 130 by Ctrl-C."""
    with _logging():
        try:
            with signals.installed():
                signals.end_with_parent()
                try:
                    app()
                except SystemExit as end:  # which is how Typer ends, also well
                    if end.code:
                        raise
                signals.check()
        except signals.Stopped as stop:
            code = stop.exit_code
            logging.getLogger("sae_transfer").error("%s; %s", stop, KEPT)
        except StudyError as error:
            code = EXIT_MENDABLE
            logging.getLogger("sae_transfer").error("%s", error)
        except Exception:  # a bug; said here, since what Python says by itself may hold secrets
            code = EXIT_BUG
            sys.stderr.write(redacted(traceback.format_exc()))
        else:
            code = 0
    sys.exit(code)
