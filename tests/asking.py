"""Asking a process to stop, as tests do it: their own."""

import os
import signal
import time


def ask(*numbers: int) -> None:
    """Send this process signals, and be there when Python runs their handlers."""
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs handlers between two of its instructions


class Dying:
    """Is asked to stop in its destructor, where what a handler raises is lost."""

    def __del__(self) -> None:
        ask(signal.SIGTERM)
