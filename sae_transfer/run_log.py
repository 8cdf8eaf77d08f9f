"""log.txt of a run directory: what is said while a run goes on, and the error that ends it."""

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from filelock import FileLock

from sae_transfer.errors import StudyError
from sae_transfer.progress import ThinProgress
from sae_transfer.redaction import Redaction

PROGRESS_EVERY_S, MAX_BYTES = 60.0, 4 * 2**20  # bound the file: one line a minute, and one older file beside it


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write to a file what the package says while the block runs, and the exception that ends the block.

    What there is no room for on the disk is left out; the block and its exception go on as without it.

    Args:
        path: The file; an older one of it lies beside it. Two processes may write it.

    Raises:
        OSError: It cannot be opened.
    """
    log = _SharedLog(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addFilter(ThinProgress(PROGRESS_EVERY_S))
    log.addFilter(Redaction())
    package_logger = logging.getLogger("sae_transfer")
    package_logger.setLevel(logging.INFO)
    package_logger.addHandler(log)
    try:
        yield
    except BaseException as error:
        log.handle(_last_record(error))  # here alone: who gets the error tells the user
        raise
    finally:
        package_logger.removeHandler(log)
        log.close()


def _last_record(error: BaseException) -> logging.LogRecord:
    """What is said of the exception that ended a run; where it is a bug, with its traceback."""
    is_bug = isinstance(error, Exception) and not isinstance(error, StudyError)
    text = "".join(traceback.format_exception(error)).rstrip() if is_bug else str(error) or type(error).__name__
    return logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None)


class _SharedLog(RotatingFileHandler):
    """A log that two processes may write: each follows when the other has begun a new file."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to the file that has the name now."""
        try:
            if not self._is_current():
                self._reopen()
        except OSError:
            self.handleError(record)
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave out what cannot be written: the terminal has it, and a traceback there might hold secrets."""

    def close(self) -> None:
        """Close the file, also when what could not be written cannot be now."""
        with suppress(OSError, ValueError):
            super().close()

    def doRollover(self) -> None:
        """Begin a new file, unless the other process just did."""
        with FileLock(Path(self.baseFilename).with_name(".lock-log")):
            if self._is_current():
                super().doRollover()
            else:
                self._reopen()

    def _is_current(self) -> bool:
        try:
            return (
                self.stream is not None
                and not self.stream.closed  # as it is left where its last bytes or its successor find no room
                and os.path.samestat(os.fstat(self.stream.fileno()), os.stat(self.baseFilename))
            )
        except FileNotFoundError:
            return False

    def _reopen(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self._open()
