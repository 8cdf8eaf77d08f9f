import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sae_transfer.errors import StudyError
from sae_transfer.sweep.cells import cell_directory
from sae_transfer.sweep.jobs import Job
from sae_transfer.sweep.states import (
    BROKEN,
    LIVE,
    STATES,
    Fact,
    Record,
    State,
    cell_states,
    choose,
    ended,
    fit_cells,
    given_back,
    job_directory,
    last_error,
    now,
    read_record,
    reconcile,
    submitted,
    update_record,
)

BASE = Job("base", "train-base", ("a", "b"), (), ("train-base",))
CHAT = Job("chat", "train-chat", ("a", "b"), (), ("train-chat",))
EVALUATE = {cell: Job(f"eval-{cell}", "evaluate", (cell,), ("base", "chat"), ("cross-eval", "report")) for cell in "ab"}
REPORT = Job("report", "report", ("a", "b"), ("eval-a", "eval-b"), ())
JOBS = [BASE, CHAT, *EVALUATE.values(), REPORT]


def trained(directory: Path, cell: str, *sides: str) -> None:
    stages = cell_directory(directory, cell) / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    for side in sides:
        (stages / f"train-{side}.json").write_text("{}")


def records(**states: State) -> dict[str, Record]:
    """Records of all jobs, pending if not given; names with _ for -."""
    given = {name.replace("_", "-"): Record(state, attempts=1, message=state) for name, state in states.items()}
    return {job.name: given.get(job.name, Record()) for job in JOBS}


def chosen(directory: Path, known: dict[str, Record], *, retry_failed: bool = False) -> list[str]:
    jobs, _ = choose(JOBS, known, directory, retry_failed=retry_failed, max_attempts=3)
    return [job.name for job in jobs]


# ---- one job ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit_code", "state", "said"),
    [
        (0, "done", ""),
        (2, "failed", "the batch is not finite"),
        (1, "failed", "the batch is not finite"),
        (75, "killed", "with a checkpoint"),
        (130, "killed", "with a checkpoint"),
        (-9, "killed", "signal 9, maybe out of memory"),
        (-15, "killed", "signal 15"),
    ],
)
def test_the_end_of_a_process_says_what_became_of_a_job(exit_code: int, state: str, said: str) -> None:
    after = ended(Record("running", attempts=1, message="old"), exit_code, "the batch is not finite")
    assert (after.state, after.exit_code, after.attempts) == (state, exit_code, 1)
    assert said in after.message and "old" not in after.message


def test_records_are_changed_by_one_process_at_a_time(tmp_path: Path) -> None:
    def add() -> None:
        for _ in range(20):
            update_record(tmp_path, "job", lambda record: replace(record, attempts=record.attempts + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_record(tmp_path, "job").attempts == 80
    assert read_record(tmp_path, "another") == Record()


def test_attempts_count_submissions_but_those_that_never_began() -> None:
    once = submitted(Record(), BASE, "local")
    assert (once.state, once.attempts, once.engine, once.cells) == ("submitted", 1, "local", ("a", "b"))
    assert submitted(replace(once, state="killed", exit_code=-9), BASE, "slurm").attempts == 2
    assert given_back(once, "cancelled").attempts == 0


def test_the_last_error_is_found_in_the_log_of_this_attempt_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("train base: 1 of 2\nerror: an old one\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write("train base: 2 of 2\n\nerror: base-standard: the loss is not finite\n  try: a smaller lr\n")
    assert last_error(log, offset) == "base-standard: the loss is not finite\n  try: a smaller lr"
    log.write_text("Traceback\n  File x\nValueError: no\n")
    assert last_error(log) == "ValueError: no"
    log.write_text("error: " + "x" * 10**6)
    assert len(last_error(log)) == 500
    assert last_error(tmp_path / "none.txt") == ""


# ---- what the scheduler says --------------------------------------------------------------------------------------


def live(state: State) -> Record:
    return Record(state, attempts=1, engine="slurm", scheduler_id="7", submitted=now(), message="own words")


@pytest.mark.parametrize(
    ("record", "fact", "state"),
    [
        (live("submitted"), Fact("submitted", "SLURM says PENDING"), "submitted"),
        (live("submitted"), Fact("running"), "running"),
        (live("running"), Fact("running"), "running"),
        (live("running"), Fact("submitted", "requeued"), "submitted"),
        (live("running"), Fact("killed", "SLURM says FAILED"), "killed"),
        (live("running"), Fact("timeout", "SLURM says TIMEOUT"), "timeout"),
        (live("submitted"), Fact("killed", "SLURM says CANCELLED"), "killed"),
        (live("submitted"), Fact("pending", "its supervisor ended"), "pending"),
        (live("running"), None, "lost"),
        (live("submitted"), None, "lost"),
        (live("killed"), Fact("submitted", "requeued"), "submitted"),
        (live("killed"), Fact("running", "SLURM says COMPLETING"), "killed"),
        (live("killed"), Fact("killed"), "killed"),
        (live("killed"), None, "killed"),
    ],
)
def test_a_live_record_is_corrected_by_its_scheduler(record: Record, fact: Fact | None, state: str) -> None:
    assert reconcile(record, fact).state == state


@pytest.mark.parametrize("state", ["pending", "done", "failed", "timeout", "lost"])
@pytest.mark.parametrize("fact", [None, Fact("killed"), Fact("running"), Fact("submitted")])
def test_a_job_that_wrote_its_end_is_believed(state: State, fact: Fact | None) -> None:
    assert reconcile(live(state), fact) == live(state)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    update_record(tmp_path, "base", lambda _: live("killed"))
    path = tmp_path / "jobs" / "base" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shard": 3}))
    with pytest.raises(StudyError, match=r"another version of sae-transfer \(its records have shard\)"):
        read_record(tmp_path, "base")


def test_reconciling_twice_changes_nothing_more() -> None:
    for state in STATES:
        for fact in (None, *(Fact(to) for to in STATES if to != "pending")):
            once = reconcile(live(state), fact)
            again = reconcile(once, fact)
            assert replace(again, ended=once.ended) == once, (state, fact)


def test_a_job_without_a_number_is_being_submitted_and_lost_only_later() -> None:
    fresh = replace(live("submitted"), scheduler_id=None)
    assert reconcile(fresh, None) == fresh
    assert reconcile(replace(fresh, submitted="2020-01-01T00:00:00+00:00"), None).state == "lost"


# ---- which jobs to submit -----------------------------------------------------------------------------------------


def test_at_first_all_is_submitted_and_at_last_nothing(tmp_path: Path) -> None:
    assert chosen(tmp_path, records()) == [job.name for job in JOBS]
    trained(tmp_path, "a", "base", "chat")
    trained(tmp_path, "b", "base", "chat")
    done = records(base="done", chat="done", eval_a="done", eval_b="done", report="done")
    assert chosen(tmp_path, done) == []
    assert chosen(tmp_path, {**done, "report": Record()}) == ["report"]


def test_a_report_that_an_evaluation_outlived_is_written_again(tmp_path: Path) -> None:
    for cell in "ab":
        trained(tmp_path, cell, "base", "chat")
    done = records(base="done", chat="done", eval_a="done", eval_b="done", report="done")
    early, late = "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01+00:00"

    def ended_at(evaluation: str, report: str) -> dict[str, Record]:
        times = {"eval-a": early, "eval-b": evaluation, "report": report}
        return {**done, **{name: replace(done[name], ended=when) for name, when in times.items()}}

    assert chosen(tmp_path, ended_at(late, early)) == ["report"]
    assert chosen(tmp_path, ended_at(early, late)) == []


@pytest.mark.parametrize("state", LIVE)
def test_what_is_live_is_not_submitted_again_and_what_waits_for_it_is(tmp_path: Path, state: State) -> None:
    assert chosen(tmp_path, records(base=state)) == ["chat", "eval-a", "eval-b", "report"]
    assert chosen(tmp_path, records(base=state, chat=state, eval_a=state, eval_b=state, report=state)) == []


def test_a_failure_holds_back_only_what_needs_it(tmp_path: Path) -> None:
    trained(tmp_path, "a", "base", "chat")
    trained(tmp_path, "b", "chat")
    known = records(base="failed", chat="done")
    jobs, held = choose(JOBS, known, tmp_path, retry_failed=False, max_attempts=3)
    assert [job.name for job in jobs] == ["eval-a", "report"]
    assert set(held) == {"base", "eval-b"} and "--retry-failed" in held["base"]
    assert chosen(tmp_path, known, retry_failed=True) == ["base", "eval-a", "eval-b", "report"]


@pytest.mark.parametrize("state", [state for state in BROKEN if state != "failed"])
def test_what_can_go_on_is_tried_until_its_attempts_are_used(tmp_path: Path, state: State) -> None:
    known = records(base=state)
    assert "base" in chosen(tmp_path, known)
    used = {**known, "base": replace(known["base"], attempts=3)}
    assert "base" not in chosen(tmp_path, used)
    assert "base" in chosen(tmp_path, used, retry_failed=True)


def test_training_that_is_done_for_some_cells_is_done_again_for_the_others(tmp_path: Path) -> None:
    trained(tmp_path, "a", "base", "chat")
    trained(tmp_path, "b", "chat")
    known = records(base="done", chat="done", eval_a="done")
    assert chosen(tmp_path, known) == ["base", "eval-b", "report"]


def test_a_job_works_on_the_cells_that_have_what_it_needs(tmp_path: Path) -> None:
    jobs = {job.name: job for job in JOBS}
    tune = Job("tune", "finetune", ("a", "b"), ("base",), ("finetune",))
    trained(tmp_path, "b", "base")
    assert fit_cells(tune, jobs, records(base="failed"), tmp_path) == ("b",)
    assert fit_cells(BASE, jobs, records(), tmp_path) == ("a", "b")
    assert fit_cells(REPORT, jobs, records(eval_a="failed"), tmp_path) == ("a", "b"), "a report says what is missing"


# ---- cells --------------------------------------------------------------------------------------------------------


def state_of(directory: Path, cell: str, known: dict[str, Record]) -> tuple[str, str, str]:
    (found,) = cell_states([cell], JOBS, known, directory)
    return found.state, found.stage, found.job


def test_a_cell_is_where_its_jobs_are(tmp_path: Path) -> None:
    assert state_of(tmp_path, "a", records()) == ("pending", "train-base", "base")
    assert state_of(tmp_path, "a", records(base="submitted")) == ("submitted", "train-base", "base")
    assert state_of(tmp_path, "a", records(base="submitted", chat="running")) == ("running", "train-chat", "chat")
    assert state_of(tmp_path, "a", records(base="killed", chat="running")) == ("killed", "train-base", "base")
    assert state_of(tmp_path, "a", records(base="killed", chat="failed")) == ("failed", "train-chat", "chat")
    trained(tmp_path, "a", "base", "chat")
    assert state_of(tmp_path, "a", records(base="failed", chat="done", eval_a="running"))[:2] == (
        "running",
        "cross-eval",
    )
    (cell_directory(tmp_path, "a") / "stages" / "cross-eval.json").write_text("{}")
    assert state_of(tmp_path, "a", records(eval_a="running"))[:2] == ("running", "report")
    assert state_of(tmp_path, "a", records(eval_a="done"))[0] == "done"
    assert state_of(tmp_path, "b", records(base="failed", eval_a="done"))[0] == "failed", "the cell beside it failed"


def test_a_cell_that_no_job_knows_is_not_done(tmp_path: Path) -> None:
    (found,) = cell_states(["c"], JOBS, records(), tmp_path)
    assert found.state == "pending" and "the same sweep command" in found.message


def test_a_running_cell_shows_the_last_line_of_its_log(tmp_path: Path) -> None:
    place = job_directory(tmp_path, "base")
    place.mkdir(parents=True)
    (place / "log.txt").write_text("norm scale\ntrain base: 3 of 9 steps\n")
    (found,) = cell_states(["a"], JOBS, records(base="running"), tmp_path)
    assert found.message == "train base: 3 of 9 steps"
    assert set(json.loads(json.dumps(found.__dict__))) == {"id", "state", "stage", "job", "message"}
