"""A job as a process of its own: the combined report of nothing, which fails at once."""

import time
from pathlib import Path

import pytest

from sae_transfer.errors import StudyError
from sae_transfer.sweep import child, local
from sae_transfer.sweep.child import Child
from sae_transfer.sweep.jobs import Job
from sae_transfer.sweep.states import read_record, submitted, update_record
from tests.disks import full

REPORT = Job("report", "report", (), (), ())


def ended_child(directory: Path) -> Child:
    update_record(directory, "report", lambda record: submitted(record, REPORT, "local"))
    child = Child(directory, REPORT, (), {})
    while child.exit_code() is None:
        time.sleep(0.1)
    return child


def test_an_end_without_a_later_attempt_is_written(tmp_path: Path) -> None:
    after = ended_child(tmp_path).finish()
    assert (after.state, read_record(tmp_path, "report")) == ("failed", after)


def test_the_end_of_an_earlier_attempt_says_nothing_of_a_later_one(tmp_path: Path) -> None:
    child = ended_child(tmp_path)
    again = update_record(tmp_path, "report", lambda record: submitted(record, REPORT, "local"))
    assert child.finish() == read_record(tmp_path, "report") == again


def test_what_a_job_says_is_kept_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = ended_child(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    with (tmp_path / "jobs" / "report" / "log.txt").open("a") as log:
        log.write("error: https://me:pass@hub.example answers hf_abcdefghijkl with 401\n")
    assert child.finish().message == "https://hub.example answers <HF_TOKEN> with 401"


def test_a_log_that_grows_is_kept_short_and_its_end_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LOG_BYTES", 200)
    update_record(tmp_path, "report", lambda record: submitted(record, REPORT, "local"))
    slots: dict[int, Child | None] = {0: Child(tmp_path, REPORT, (), {})}
    log = tmp_path / "jobs" / "report" / "log.txt"
    with log.open("a") as said:
        said.write("step\n" * 41)
    while slots[0] is not None:
        local._collect(slots, set())
        time.sleep(0.1)
    assert log.with_name("log.previous.txt").read_text() == "step\n" * 41
    message = read_record(tmp_path, "report").message
    assert log.stat().st_size < 200 and message and message in log.read_text()


def test_a_full_disk_delays_what_is_written_of_a_job_and_loses_none_of_it(small_disk: Path) -> None:
    update_record(small_disk, "report", lambda record: submitted(record, REPORT, "local"))
    child = Child(small_disk, REPORT, (), {})
    with full(small_disk):
        while child.exit_code() is None:
            child.tend()
            time.sleep(0.1)
        with pytest.raises(StudyError, match="No space left"):
            child.finish()
        assert read_record(small_disk, "report").state == "running"
    assert child.exit_code() == 2, "it can still be asked once it was waited for"
    assert child.finish().state == read_record(small_disk, "report").state == "failed"
