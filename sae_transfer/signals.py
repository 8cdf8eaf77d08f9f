"""Asked to stop (by a scheduler or Ctrl-C): at once where every file is written whole, between two steps in training.

A handler runs wherever Python happens to be. What it raises is lost where that is a `__del__` or a callback of a weak
reference, so it also notes that it was asked, and what takes long calls `check` between its units of work. Raised while
a module is imported, it would abort the process where C++ imports, and transformers would take it for a missing module:
there it is put off until the import is over.
Only main programs install the handlers; before they do, nothing here does anything.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_STOPPED, EXIT_INTERRUPTED = 75, 130
SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # submitit can be told to use either of the last two
STOPPING = (*SCHEDULERS, signal.SIGINT)
PARENT_VARIABLE = "SAE_TRANSFER_PARENT"
IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # file name of the frames from which Python carries a module out
AGAIN_S = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(BaseException):
    """The process was asked to stop. Like KeyboardInterrupt it is no error, and nothing that catches errors holds it.

    Attributes:
        signal: Which signal asked.
        exit_code: 130 after Ctrl-C, else 75: run again, it goes on.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {self.signal.name}")


@dataclass
class _State:
    asked: int | None = None  # the first signal that asked
    n_deferring: int = 0  # blocks that have put it off
    n_interrupts: int = 0


_state = _State()
_counting = threading.Lock()  # trainings run in threads of their own


@contextmanager
def installed() -> Iterator[None]:
    """Handle the signals that ask to stop while the block runs; in the main thread.

    Where the block ends by an exception, threads that it left at work can hear afterwards that they were asked. And who
    was asked is left deaf to schedulers, which send one signal after another, to parents and children: the second would
    end the process before it has said why, and with another exit code.
    """
    global _state
    _state = _State()
    before = {number: signal.signal(number, _handle) for number in STOPPING}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _handle_again)
    hook = sys.unraisablehook

    def hook_without_stops(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, Stopped):  # that is raised again by the next check
            hook(unraisable)

    sys.unraisablehook = hook_without_stops
    try:
        yield
    except BaseException:
        if _state.asked is not None:
            before |= dict.fromkeys(SCHEDULERS, signal.SIG_IGN)
        raise
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    _state = _State()


@contextmanager
def deferred() -> Iterator[None]:
    """While the block runs, a signal is only noted, and `check` raises it; at the latest when the block ends well."""
    state = _state  # the block may outlive it
    with _counting:
        state.n_deferring += 1
    try:
        yield
    finally:
        with _counting:
            state.n_deferring -= 1
    check()


def check() -> None:
    """Raise `Stopped` if the process was asked to stop; not for what cleans up after it."""
    if _state.asked is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it would stop what cleans up
        raise Stopped(_state.asked)


def end_with_parent() -> None:
    """Ask the kernel (Linux) for SIGTERM when the parent dies, if a sae-transfer process started this one and said so.

    The kernel counts the thread that started this process as its parent: it has to live as long as the process.

    Raises:
        Stopped: The parent is gone already.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)  # it is about this process, not about those that it starts
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        _state.asked = signal.SIGTERM
        check()


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        _state.n_interrupts += 1
        if _state.n_interrupts > 1:
            if _is_importing(frame):
                os._exit(EXIT_INTERRUPTED)
            raise KeyboardInterrupt
    if _state.asked is None:  # only the first: a later one would stop what cleans up after it
        _state.asked = number
        _stop_or_wait(frame)


def _handle_again(_: int, frame: FrameType | None) -> None:
    if _state.asked is not None:
        _stop_or_wait(frame)


def _stop_or_wait(frame: FrameType | None) -> None:
    if _state.n_deferring:
        return  # the end of those blocks is a check
    if _is_importing(frame):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    else:
        check()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != IMPORT_SYSTEM:
        frame = frame.f_back
    return frame is not None
