"""Log records on a terminal, and on what cannot be written."""

import logging

import pytest
from rich.console import Console

from sae_transfer.console import ConsoleHandler


def test_a_full_disk_behind_stderr_ends_nothing() -> None:
    handled = 0
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as full:  # closing it writes once more
        handler = ConsoleHandler(Console(file=full))
        for text in ("one", "two"):
            handler.handle(logging.LogRecord("a", logging.INFO, "", 1, text, None, None))
            handled += 1
    assert handled == 2
