"""A run directory: paths, atomic writes, stage records, manifest and lock. Knows nothing of what a stage computes."""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError

from sae_transfer import __version__
from sae_transfer.config import SIDES, Study
from sae_transfer.errors import StudyError
from sae_transfer.redaction import redacted
from sae_transfer.run_log import logged
from sae_transfer.study_file import resolved_yaml

logger = logging.getLogger(__name__)

SAMPLE_SLICES, SAMPLE_BYTES = 64, 2**16
LOCK_FILE = ".lock"
# Seconds to wait for a run directory in use. Jobs of a sweep do: one may begin while its earlier attempt still writes.
PATIENCE_VARIABLE = "SAE_TRANSFER_LOCK_PATIENCE_S"
# Written before the manifest; also what a killed process left of them while it wrote.
OWN_EARLY_FILES = re.compile(
    r"\.lock(-base|-chat|-log)?|log\.txt(\.1)?|wandb|(study\.yaml|wandb(-base|-chat)?\.json)"
    r"|\.(study\.yaml|manifest\.json|wandb(-base|-chat)?\.json)\.\w+"
)
RECORDED_PACKAGES = ("sae-transfer", "sae-lens", "transformer-lens", "torch", "transformers", "datasets", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: Where to; its directory is created.
        text: The content, UTF-8.

    Raises:
        StudyError: The place cannot be written or the disk is full.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented for people; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, sync it and rename it into place.

    Args:
        path: A file or a directory. A directory that is there already is replaced as a whole.

    Yields:
        The temporary path, not yet existing.

    Raises:
        StudyError: The place cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_scratch(path.parent, re.escape(path.name))
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            temporary = Path(scratch) / path.name
            yield temporary
            sync(temporary)
            if temporary.is_dir() and path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            sync(path.parent, recursive=False)  # the name is an entry of the directory, and on the disk only with it
    except (OSError, SafetensorError) as error:
        raise StudyError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})",
            "check free space and permissions, or choose another place with --out DIR",
        ) from error


def sync(path: Path, *, recursive: bool = True) -> None:
    """Flush a file, or a directory and by default all that is in it, to the disk."""
    inside = sorted(path.rglob("*")) if recursive and path.is_dir() else []
    for entry in [*inside, path]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def scratch_in(directory: Path) -> Iterator[Path]:
    """Give a temporary directory inside `directory`, which is created, for arrays that do not fit in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    clear_scratch(directory, "scratch")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".scratch.") as scratch:
        yield Path(scratch)


def clear_scratch(directory: Path, name: str = ".+") -> None:
    """Remove temporary directories that a killed process left in a directory.

    Args:
        directory: That no other process works in.
        name: A pattern of what they were for.
    """
    left = re.compile(rf"\.{name}\.[a-z0-9_]{{8}}")  # as tempfile names them
    for path in list(directory.glob(".*")):
        if left.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def digest(value: Any) -> str:
    """Sha256 (hex) of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Sha256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sampled_digest(path: Path) -> str:
    """Sha256 (hex) of a file's size, ends and evenly spread slices, all of a small file: enough to tell a change."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLE_SLICES * SAMPLE_BYTES:
            sha.update(file.read())
        else:
            for index in range(SAMPLE_SLICES):
                file.seek(index * (size - SAMPLE_BYTES) // (SAMPLE_SLICES - 1))
                sha.update(file.read(SAMPLE_BYTES))
    return sha.hexdigest()


class RunDirectory:
    """Where one study's results live. `open` checks that the directory is this study's before anything is written."""

    def __init__(self, root: Path) -> None:
        """Wrap a path; nothing is read or written.

        Args:
            root: The run directory.
        """
        self.root = root
        self._shared = FileLock(root / LOCK_FILE)

    @classmethod
    @contextmanager
    def open(cls, root: Path, identity: Mapping[str, str], sides: Sequence[str] = SIDES) -> "Iterator[RunDirectory]":
        """Take the directory for a study: create or recognise it, and lock it.

        The system drops a lock when its process dies, however it dies: none is ever stale.

        Args:
            root: The run directory.
            identity: What no run directory may have two of: fingerprints of the models, and the site.
            sides: What is locked. Two processes may share a directory when each trains the SAEs of one model, and takes
                that side alone; everything else needs both.

        Yields:
            The locked run directory.

        Raises:
            StudyError: It holds something else, another study or a newer version's files; another process uses it; it
                cannot be written.
        """
        run = cls(root)
        run._refuse_if_foreign(identity)
        with ExitStack() as stack:
            try:
                root.mkdir(parents=True, exist_ok=True)
                for side in sides:
                    stack.enter_context(_acquired(FileLock(root / f"{LOCK_FILE}-{side}")))
                stack.enter_context(logged(root / "log.txt"))
            except Timeout as error:
                raise StudyError(
                    f"{root}: another sae-transfer process is working in this directory",
                    "wait for it, stop it, or choose another place with --out DIR",
                ) from error
            except OSError as error:
                raise StudyError(
                    f"{root}: cannot be written ({error.strerror or error})", "choose another place with --out DIR"
                ) from error
            yield run

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep out, for the length of the block, a process that trains the other model's SAEs in this directory."""
        if not self._shared.is_locked:
            try:
                self._shared.acquire(timeout=0)
            except Timeout:
                logger.info("%s: waiting for another process to make what both need", self.root)
                self._shared.acquire()
        else:
            self._shared.acquire()
        try:
            yield
        finally:
            self._shared.release()

    def _refuse_if_foreign(self, identity: Mapping[str, str]) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise StudyError(
                f"{self.root}: a file stands where the run directory should be", "choose another --out DIR"
            )
        if not self.root.is_dir():
            return
        there = read_json(self.root / "manifest.json")
        if not (self.root / "study.yaml").exists() or "study" not in there:
            if any(not OWN_EARLY_FILES.fullmatch(path.name) for path in self.root.iterdir()):
                raise StudyError(
                    f"{self.root}: is not empty, and not a run directory (it has no study.yaml and manifest.json)",
                    "choose an empty or new directory with --out DIR",
                )
            return
        refuse_newer(self.root)
        known = there.get("identity") or {}
        other = [label for label in identity if label in known and known[label] != identity[label]]
        if other:
            raise StudyError(
                f"{self.root}: belongs to another study, {there['study']}; other than here: {', '.join(other)}",
                "choose another place with --out DIR, or another name in the study file",
            )

    def adopt(self, study: Study) -> None:
        """Write the resolved study file: from now on, what is done here is done for this study."""
        with self.exclusively():
            write_text(self.root / "study.yaml", resolved_yaml(study))
            self.update_manifest(study=study.name)

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None when it has not been finished."""
        record = read_json(self._record_path(stage))
        return record if "inputs" in record else None

    def changed_inputs(self, stage: str, inputs: Mapping[str, Any]) -> list[str] | None:
        """Which inputs of a finished stage differ from those given now.

        Args:
            stage: The stage's name.
            inputs: Label -> JSON value, everything the stage's numbers depend on.

        Returns:
            None when the stage has no record; else the labels that differ, empty when it is up to date.
        """
        record = self.record(stage)
        if record is None:
            return None
        then = record["inputs"]
        return [label for label in sorted({*then, *inputs}) if then.get(label) != digest(inputs.get(label))]

    def finish(self, stage: str, inputs: Mapping[str, Any], seconds: float) -> None:
        """Write a stage's record. It comes last: a stage whose record exists is done.

        Args:
            stage: The stage's name.
            inputs: As given to `changed_inputs`.
            seconds: How long the stage took, wall clock.
        """
        hashes = {label: digest(value) for label, value in inputs.items()}
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self._record_path(stage), {"inputs": hashes, "finished": finished, "seconds": round(seconds, 1)})

    def forget(self, stage: str) -> None:
        """Remove a stage's record before its files are touched, so that a half-redone stage never counts as done."""
        self._record_path(stage).unlink(missing_ok=True)

    def _record_path(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def update_manifest(self, **entries: Any) -> None:
        """Merge entries, and what they map, into manifest.json; versions and command are the present process's."""
        path = self.root / "manifest.json"
        with self.exclusively():
            manifest = read_json(path)
            manifest.update(_surroundings())
            manifest.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))
            for key, value in entries.items():
                known = manifest.get(key)
                manifest[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
            write_json(path, manifest)


def refuse_newer(root: Path) -> None:
    """Refuse a run directory that a newer version wrote.

    Raises:
        StudyError: It was.
    """
    written_by = (read_json(root / "manifest.json").get("packages") or {}).get("sae-transfer", __version__)
    if _is_newer(written_by):
        raise StudyError(
            f"{root}: was written by sae-transfer {written_by}, and this is {__version__}",
            f"install sae-transfer {written_by} or later, or choose another place with --out DIR",
        )


def _acquired(lock: FileLock) -> AcquireReturnProxy:
    """A lock, waited for as long as the environment says; raises `Timeout` after that."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        patience = float(os.environ.get(PATIENCE_VARIABLE) or 0)
        if patience:
            logger.info("%s: in use; waiting up to %.0f s", Path(lock.lock_file).parent, patience)
        return lock.acquire(timeout=patience)


def _is_newer(version: str) -> bool:
    try:
        return Version(version) > Version(__version__)
    except InvalidVersion:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is none, or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _surroundings() -> dict[str, Any]:
    return {
        "command": [Path(sys.argv[0]).name, *map(redacted, sys.argv[1:])],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in RECORDED_PACKAGES},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the package's own checkout, None when it is not run from one."""

    def git(*arguments: str) -> str:
        # without locks: `status` would refresh the index of a checkout that is not ours, and leave its lock when killed
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None
