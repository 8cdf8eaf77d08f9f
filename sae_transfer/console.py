"""Log records on the terminal: progress drawn in place, or one plain line now and then where there is no terminal."""

import logging

from rich.console import Console

from sae_transfer.progress import ThinProgress
from sae_transfer.redaction import Redaction

PLAIN_EVERY_S = 10.0


class ConsoleHandler(logging.Handler):
    """Writes to a rich console; on a terminal, progress is one line that is drawn over."""

    def __init__(self, console: Console) -> None:
        """Take a console.

        Args:
            console: Usually on stderr.
        """
        super().__init__()
        self._console = console
        self._status = console.status("") if console.is_terminal else None
        self._is_drawn = False
        self.addFilter(Redaction())
        if self._status is None:
            self.addFilter(ThinProgress(PLAIN_EVERY_S))

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record; what cannot be shown, as on a full disk, ends nothing."""
        try:
            self._show(record)
        except Exception:
            self.handleError(record)

    def _show(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        progress = getattr(record, "progress", None)
        if self._status is not None and progress is not None and progress[1] < progress[2]:
            self._status.update(text)
            if not self._is_drawn:
                self._status.start()
                self._is_drawn = True
            return
        self._stop()
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(f"{prefix}{text}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove what is drawn."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._status is not None and self._is_drawn:
            self._status.stop()
            self._is_drawn = False
