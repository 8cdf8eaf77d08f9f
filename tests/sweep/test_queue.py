import pytest

from sae_transfer.errors import StudyError
from sae_transfer.sweep import queue
from sae_transfer.sweep.states import Fact


def test_listings_of_squeue_and_sacct_are_read() -> None:
    squeue = (
        "12|PENDING|Dependency\n13_0|RUNNING|None\n13_1|COMPLETING|None\n14|FAILED|NonZeroExitCode\n15|REQUEUED|None\n"
    )
    assert queue.parse(squeue) == {
        "12": Fact("submitted", "SLURM says PENDING (Dependency)"),
        "13_0": Fact("running", "SLURM says RUNNING"),
        "13_1": Fact("running", "SLURM says COMPLETING"),
        "14": Fact("killed", "SLURM says FAILED (NonZeroExitCode)"),
        "15": Fact("submitted", "SLURM says REQUEUED"),
    }
    sacct = "16|CANCELLED by 0\n17|TIMEOUT\n18_3|OUT_OF_MEMORY\n19|NODE_FAIL\n20|COMPLETED\n21|CANCELLED+\n"
    assert {job: fact.state for job, fact in queue.parse(sacct).items()} == {
        "16": "killed",
        "17": "timeout",
        "18_3": "killed",
        "19": "killed",
        "20": "killed",
        "21": "killed",
    }
    assert queue.parse("") == queue.parse("\n22|SOMETHING_NEW\n") == {}


def test_without_slurm_a_question_is_refused_and_no_question_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert queue.ask([]) == {}
    queue.cancel([])
    with pytest.raises(StudyError, match="squeue is not there"):
        queue.ask(["1"])
