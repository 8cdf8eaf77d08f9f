"""Asked to stop: at once or at the next check, told apart by its signal; and no child outlives its parent."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sae_transfer import cli, signals
from tests.asking import Dying, ask

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)]
)
def test_a_signal_stops_at_once_with_its_exit_code(number: int, code: int) -> None:
    with signals.installed(), pytest.raises(signals.Stopped) as stop:
        ask(number)
    assert stop.value.exit_code == code and stop.value.signal == number


def test_in_training_a_signal_waits_for_the_next_check_and_the_first_one_counts() -> None:
    passed = []

    def training() -> None:
        with signals.deferred():
            signals.check()
            ask(signal.SIGTERM, signal.SIGUSR2)
            passed.append("step")
            signals.check()
            passed.append("step after the check")

    with signals.installed(), pytest.raises(signals.Stopped, match="SIGTERM"):
        training()
    assert passed == ["step"]


def test_a_signal_after_the_last_check_is_raised_when_training_is_over() -> None:
    passed = []

    def stages() -> None:
        with signals.deferred():
            ask(signal.SIGTERM)
            passed.append("stored")
        passed.append("next stage")

    with signals.installed(), pytest.raises(signals.Stopped):
        stages()
    assert passed == ["stored"]


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with signals.installed(), pytest.raises(KeyboardInterrupt), signals.deferred():
        ask(signal.SIGINT, signal.SIGINT)


def test_what_is_cleaned_up_after_a_stop_is_not_stopped_again() -> None:
    cleaned = []

    def stage() -> None:
        try:
            ask(signal.SIGTERM)
        finally:
            ask(signal.SIGTERM)
            cleaned.append(True)

    with signals.installed(), pytest.raises(signals.Stopped):
        stage()
    assert cleaned


def test_a_stop_that_was_lost_in_a_destructor_is_raised_by_every_later_check() -> None:
    with signals.installed():
        Dying()
        for _ in range(2):
            with pytest.raises(signals.Stopped, match="SIGTERM"):
                signals.check()


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of some code."""
    monkeypatch.syspath_prepend(tmp_path)

    def import_it(code: str) -> ModuleType:
        (tmp_path / "imported_in_a_test.py").write_text(code)
        return importlib.import_module("imported_in_a_test")

    yield import_it
    sys.modules.pop("imported_in_a_test", None)


def test_a_stop_while_a_module_is_imported_comes_once_it_is(importing: Callable[[str], ModuleType]) -> None:
    passed, cleaned = [], []

    def stage() -> None:
        try:
            importing("from tests.asking import ask; ask(15)")
            passed.append("import")
            time.sleep(10)
            passed.append("what follows")
        finally:
            time.sleep(2 * signals.AGAIN_S)
            cleaned.append(True)

    with signals.installed(), pytest.raises(signals.Stopped, match="SIGTERM"):
        stage()
    assert (passed, cleaned) == (["import"], [True])


def test_a_check_that_comes_before_is_the_only_stop(importing: Callable[[str], ModuleType]) -> None:
    cleaned = []

    def stage() -> None:
        try:
            importing("from tests.asking import ask; ask(15)")
            signals.check()
        finally:
            time.sleep(2 * signals.AGAIN_S)
            cleaned.append(True)

    with signals.installed(), pytest.raises(signals.Stopped, match="SIGTERM"):
        stage()
    assert cleaned


IN_AN_IMPORT = """
import os, signal, sys, threading, time
from sae_transfer import cli
def app():
    def ask_twice():
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=ask_twice, daemon=True).start()
    import takes_long
cli.app = app
cli.main()
"""


def test_a_second_ctrl_c_does_not_wait_for_an_import(tmp_path: Path) -> None:
    (tmp_path / "takes_long.py").write_text("import time; time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)])}
    end = subprocess.run([sys.executable, "-c", IN_AN_IMPORT], env=environment, timeout=50, check=False)
    assert end.returncode == 130


ASKED_AGAIN = """
import atexit, logging, signal
from sae_transfer import cli
from tests.asking import ask
def again(*_):
    ask(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    return True
logging.getLogger("sae_transfer").addFilter(again)
atexit.register(again)
cli.app = lambda: ask(signal.SIGUSR2)
cli.main()
"""


def test_who_was_asked_says_so_whatever_else_a_scheduler_sends() -> None:
    end = subprocess.run([sys.executable, "-c", ASKED_AGAIN], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert end.returncode == 75
    assert "stopped by SIGUSR2" in end.stderr


def test_a_command_that_lost_a_stop_does_not_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: Dying() and sys.exit(0))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 75


def test_of_what_destructors_raise_only_a_stop_goes_unsaid(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("not closed")

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest has its own
    with signals.installed():
        Dying()
        Failing()
    said = capsys.readouterr().err
    assert "ValueError: not closed" in said and "Stopped" not in said


def test_threads_that_are_still_at_work_are_told_when_the_command_has_gone() -> None:
    heard = []

    def work() -> None:
        gone.wait(10)
        try:
            signals.check()
        except signals.Stopped:
            heard.append(True)

    gone, thread = threading.Event(), threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt), signals.installed(), signals.deferred():
        ask(signal.SIGINT, signal.SIGINT)
    gone.set()
    thread.join()
    assert heard


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with signals.installed():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


CHILD = """
import sys, time
from sae_transfer import signals
try:
    with signals.installed():
        signals.end_with_parent()
        print("started", flush=True)
        time.sleep(60)
except signals.Stopped as stop:
    print(stop, flush=True)
"""
PARENT = """
import os, subprocess, sys, time
environment = {**os.environ, "SAE_TRANSFER_PARENT": str(os.getpid())}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a child that its parent died")
def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == "stopped by SIGTERM\n"  # to the end of the pipe: the child is gone


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    environment = {**os.environ, signals.PARENT_VARIABLE: "1234567"}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout == "stopped by SIGTERM\n"
