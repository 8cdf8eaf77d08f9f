"""Progress of a long loop as log records: a count, a rate, an ETA. Handlers thin them out or draw them in place."""

import logging
import time

logger = logging.getLogger(__name__)

EMIT_EVERY_S = 0.5


class Meter:
    """Counts towards a total and logs where it stands at most every half second, and at the end.

    Each record carries `progress = (label, done, total)`, so that a handler can thin them out or draw them in place.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        """Start the clock.

        Args:
            label: What is being done, for example `train base`.
            total: Where `done` will end.
            unit: What is counted, plural.
        """
        self._label, self._total, self._unit = label, total, unit
        self._started = self._emitted = time.monotonic()
        self._first: int | None = None

    def update(self, done: int, figures: str = "") -> None:
        """Say how far it is.

        Args:
            done: Units done in all, also those of an earlier process.
            figures: More to show, for example the loss.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = 0 if done >= self._total else done
        if now - self._emitted < EMIT_EVERY_S and done < self._total:
            return
        self._emitted = now
        rate = (done - self._first) / max(now - self._started, 1e-9)
        parts = [f"{self._label}: {done:,} of {self._total:,} {self._unit} ({done / max(1, self._total):.0%})"]
        if figures:
            parts.append(figures)
        if rate > 0:
            parts.append(f"{rate:,.0f} {self._unit}/s")
            parts.append(
                f"ETA {_clock((self._total - done) / rate)}" if done < self._total else _clock(now - self._started)
            )
        logger.info(" | ".join(parts), extra={"progress": (self._label, done, self._total)})


class ThinProgress(logging.Filter):
    """Lets through one progress record of a label every so often, the last one always, and all other records."""

    def __init__(self, every_s: float) -> None:
        """Start with nothing seen.

        Args:
            every_s: Seconds between two progress records of one label.
        """
        super().__init__()
        self._every_s = every_s
        self._seen: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        progress = getattr(record, "progress", None)
        if progress is None:
            return True
        label, done, total = progress
        now = time.monotonic()
        if done < total and now - self._seen.get(label, -self._every_s) < self._every_s:
            return False
        self._seen[label] = now
        return True


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
