"""Curves, tables, figures and SAEs to wandb, when asked; the only module that imports wandb. Never the only copy."""

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from sae_transfer.errors import StudyError
from sae_transfer.study import read_json, write_json

logger = logging.getLogger(__name__)

Mode = Literal["disabled", "offline", "online"]
TIMEOUT_S = 60


class Tracker(Protocol):
    """Where a run's figures go besides its directory."""

    def log_curve(self, sae: str, entry: Mapping[str, float | None]) -> None:
        """One point of a training curve, as train_log.jsonl has it."""
        ...

    def log_results(self, run: Path, saes: Sequence[Path]) -> None:
        """Result tables, figures and SAEs, once they are on disk."""
        ...


class NoTracker:
    """Does nothing, so that no one else has to ask whether wandb is on."""

    def log_curve(self, sae: str, entry: Mapping[str, float | None]) -> None:
        """See `Tracker`."""

    def log_results(self, run: Path, saes: Sequence[Path]) -> None:
        """See `Tracker`."""


class WandbTracker:
    """The wandb run of a run directory. Once wandb refuses something, that is said, and it is told no more."""

    def __init__(self, run: Any) -> None:
        """Take a started run.

        Args:
            run: A wandb run.
        """
        self._run = run
        self._curves: set[str] = set()
        self._has_refused = False

    def log_curve(self, sae: str, entry: Mapping[str, float | None]) -> None:
        """See `Tracker`; keys are `train/<sae>/loss` and so on, against tokens."""
        self._tell(lambda: self._log_curve(sae, entry))

    def log_results(self, run: Path, saes: Sequence[Path]) -> None:
        """See `Tracker`; tables as `eval/<stage>/<file>`, figures as `figures/<name>`, an artifact for each SAE."""
        self._tell(lambda: self._log_results(run, saes))

    def finish(self) -> None:
        """End the wandb run, also one that refused something."""
        self._try(self._run.finish)

    def _tell(self, tell: Callable[[], None]) -> None:
        if not self._has_refused:
            self._try(tell)

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # wandb's errors are many, and none of them may stop a study
            if not self._has_refused:
                logger.warning("wandb: %s (%s); it is told no more, every file is here", type(error).__name__, error)
            self._has_refused = True

    def _log_curve(self, sae: str, entry: Mapping[str, float | None]) -> None:
        axis = f"train/{sae}/tokens"
        if sae not in self._curves:
            self._run.define_metric(f"train/{sae}/*", step_metric=axis)
            self._curves.add(sae)
        self._run.log({f"train/{sae}/{key}": value for key, value in entry.items()})

    def _log_results(self, run: Path, saes: Sequence[Path]) -> None:
        import pandas as pd
        import wandb

        for path in sorted(run.glob("*/*.csv")):
            table = pd.read_csv(path)
            if len(table):
                self._run.log({f"eval/{path.parent.name}/{path.stem}": wandb.Table(dataframe=table)})
        for path in sorted((run / "report" / "figures").glob("*.png")):
            self._run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        for directory in saes:
            artifact = wandb.Artifact(f"{self._run.project}-{directory.name}", type="sae")
            for name in ("sae_weights.safetensors", "cfg.json", "provenance.json"):
                artifact.add_file(str(directory / name))
            self._run.log_artifact(artifact)


@contextmanager
def open_tracker(
    mode: Mode,
    *,
    project: str,
    entity: str | None,
    name: str,
    config: Mapping[str, Any],
    directory: Path,
    part: str | None = None,
) -> Iterator[Tracker]:
    """Start tracking, and end it with the block. Processes that work in a run directory in turn are one wandb run.

    Online without a login or a network becomes offline, with a warning: nothing is lost, `wandb sync` sends it later.

    Args:
        mode: wandb's own.
        project: wandb project.
        entity: wandb user or team; None takes wandb's default.
        name: Of the wandb run.
        config: The study.
        directory: wandb's files go into `wandb/` below it; `wandb.json` keeps its id.
        part: `base` or `chat` in a process that trains that model's SAEs alone, maybe beside one for the other's: it
            has a wandb run of its own, since two processes cannot write into one.

    Yields:
        The tracker.
    """
    if mode == "disabled":
        yield NoTracker()
        return
    import wandb

    suffix = f"-{part}" if part else ""
    id_file = directory / f"wandb{suffix}.json"
    known = read_json(id_file).get("id")
    run_id = known or uuid.uuid4().hex[:8]
    if known is None:
        write_json(id_file, {"id": run_id})

    def start(how: Mode) -> Any:
        # wandb would keep the git remote, with any credentials in its URL
        settings = wandb.Settings(silent=True, init_timeout=TIMEOUT_S, disable_git=True)
        return wandb.init(
            project=project,
            entity=entity,
            name=f"{name}{suffix}",
            id=run_id,
            resume="allow",
            reinit="create_new",  # studies that are trained together have a run each
            config=dict(config),
            dir=str(directory),
            mode=how,
            settings=settings,
        )

    if mode == "online" and wandb.api.api_key is None:  # asked for here, since wandb itself would prompt at a terminal
        logger.warning("wandb: no one is logged in (`wandb login`); going on offline, `wandb sync` sends it later")
        mode = "offline"
    try:
        run = start(mode)
    except Exception as error:
        logger.warning("wandb: %s (%s); going on offline, `wandb sync` sends it later", type(error).__name__, error)
        try:
            run = start("offline")
        except Exception as error:
            logger.warning("wandb: %s (%s); going on without it", type(error).__name__, error)
            yield NoTracker()
            return
    tracker = WandbTracker(run)
    try:
        yield tracker
    finally:
        tracker.finish()


def download_artifact(name: str, directory: Path) -> None:
    """Download a wandb artifact's files.

    Args:
        name: `entity/project/artifact:version`; the version may be an alias such as `latest`.
        directory: Where its files go.

    Raises:
        StudyError: No one is logged in, wandb cannot be reached, or there is no such artifact.
    """
    import wandb

    try:
        wandb.Api(timeout=TIMEOUT_S).artifact(name).download(root=str(directory))
    except Exception as error:  # wandb's own errors, and those of what it downloads with
        raise StudyError(
            f"{name}: the wandb artifact cannot be had ({type(error).__name__}: {error})",
            "check the name, the network and the login (`wandb login`, or WANDB_API_KEY); or download it elsewhere"
            f" (`wandb artifact get {name}`) and name the directory",
        ) from error
