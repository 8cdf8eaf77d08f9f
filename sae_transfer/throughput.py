"""Tokens per second of each part of a stage, so that a user sees which one holds up the others."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LANGUAGE_MODEL, SAE_STEP, CHECKPOINT, TOKENS = "language_model", "sae_step", "checkpoint", "tokens"


class Throughput:
    """Wall-clock seconds and tokens of each part.

    Time spent in a part that is timed inside another one counts for the inner one alone. Parts in different threads
    overlap: then each says how fast it went beside the others, and their seconds add up to more than passed.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._thread = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def timing(self, part: str, n_tokens: int = 0) -> Iterator[None]:
        """Count the time of a block, and the tokens that are done when it ends.

        A GPU works on after the block; whoever wants its time counted lets it finish within one.

        Args:
            part: What the block does, for example `language_model`.
            n_tokens: How many tokens the part is further by it, when `count` is not told.
        """
        outside, self._thread.inner = getattr(self._thread, "inner", 0.0), 0.0
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            with self._lock:
                self._seconds[part] = self._seconds.get(part, 0.0) + seconds - self._thread.inner
            self._thread.inner = outside + seconds
            self.count(part, n_tokens)

    def count(self, part: str, n_tokens: int) -> None:
        """Say that a part is so many tokens further."""
        with self._lock:
            self._tokens[part] = self._tokens.get(part, 0) + n_tokens

    def rates(self) -> dict[str, int]:
        """Tokens per second of each part that did any tokens, in the order in which they were first counted."""
        done = {part: n_tokens for part, n_tokens in self._tokens.items() if n_tokens}
        return {part: round(n_tokens / max(self._seconds[part], 1e-9)) for part, n_tokens in done.items()}

    def __str__(self) -> str:
        """All rates in one line, the slowest part first."""
        slowest_first = sorted(self.rates().items(), key=lambda rate: rate[1])
        return ", ".join(f"{part.replace('_', ' ')} {rate:,} tokens/s" for part, rate in slowest_first)
