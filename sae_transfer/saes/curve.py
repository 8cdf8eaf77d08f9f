"""The training curve of one SAE on disk: cut to its checkpoint on resuming, and continued without gap or repeat."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_transfer.errors import StudyError
from sae_transfer.study import sync, write_text

logger = logging.getLogger(__name__)

LOG_FILE = "train_log.jsonl"
TOLD_FILE = "train_log.told"  # number of entries that were told to a tracker, where the log has been cut to fewer


class CurveLog:
    """`train_log.jsonl`, an entry a line. While the disk is full, entries wait."""

    def __init__(self, path: Path, n_kept: int, *, is_new: bool = False) -> None:
        """Cut the file to its first entries.

        Args:
            path: The file; absent is empty.
            n_kept: Entries that stay.
            is_new: What comes after them is another curve than what stands there.

        Raises:
            StudyError: It cannot be written.
        """
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < n_kept:
            logger.warning("%s: has %d of the %d entries before the checkpoint", path, len(whole), n_kept)
        self.n_entries = n_kept
        self._told_path = path.with_name(TOLD_FILE)
        if is_new:
            self._told_path.unlink(missing_ok=True)
        told = self._told_path.read_text() if self._told_path.exists() else "0"
        self._n_told = n_kept if is_new else max(n_kept, len(whole), int(told))
        if self._n_told > max(n_kept, int(told)):
            write_text(self._told_path, str(self._n_told))  # before the lines go
        self._size = sum(map(len, whole[:n_kept]))
        self._waiting = b""
        self.flush()

    def add(self, entry: Mapping[str, Any]) -> bool:
        """Append an entry.

        Args:
            entry: JSON values.

        Returns:
            Whether it is new; False: a process before this one came as far.
        """
        is_first_to_wait = not self._waiting
        self._waiting += json.dumps(entry).encode() + b"\n"
        self.n_entries += 1
        try:
            self._write()
        except OSError as error:
            if is_first_to_wait:
                logger.warning("%s: cannot be written (%s); its entries wait", self._path, error.strerror or error)
        return self.n_entries > self._n_told

    def flush(self) -> None:
        """Put all entries on the disk.

        Raises:
            StudyError: It cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
            sync(self._path)
        except OSError as error:
            raise StudyError(
                f"{self._path}: cannot be written ({error.strerror or error})",
                "check free space and permissions, or choose another place with --out DIR",
            ) from error

    def close(self) -> None:
        """The curve is whole: what was told of it no longer matters."""
        self._told_path.unlink(missing_ok=True)

    def _write(self) -> None:
        with self._path.open("ab") as file:
            file.truncate(self._size)  # what a write that failed left
            file.write(self._waiting)
        self._size += len(self._waiting)
        self._waiting = b""
