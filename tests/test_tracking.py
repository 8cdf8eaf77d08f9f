"""wandb: what an offline run holds, read back from its file; and that nothing depends on it."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.pipeline import run_stages
from sae_transfer.saes.stream import ActivationStream
from sae_transfer.study_file import load_study
from sae_transfer.tracking import NoTracker, download_artifact, open_tracker
from tests.studies import write_study

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7  # of wandb's file, which is a LevelDB log: blocks of checksum, length, type
FULL, LAST = 1, 4


def records(run: Path) -> list[Any]:
    """All records of the one offline run below a directory."""
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return records_in(path)


def records_in(path: Path) -> list[Any]:
    """All records of a file, once wandb's own process has written the last."""
    for _ in range(300):
        found = parsed(path.read_bytes())
        if found and found[-1].HasField("exit"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def parsed(data: bytes) -> list[Any]:
    at, found, parts = FILE_HEADER, [], b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def history(found: list[Any]) -> list[dict[str, Any]]:
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]


def test_an_offline_run_holds_configuration_curves_tables_figures_and_saes(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    study = load_study(write_study(tmp_path, *llama_pair, text_file, tracking={"wandb": "offline"}))
    run = tmp_path / "run"
    run_stages(study, run, ("train", "cross-eval", "report"))
    found = records(run)
    config = {update.key: update.value_json for record in found for update in record.run.config.update}
    config |= {update.key: update.value_json for record in found for update in record.config.update}
    assert json.loads(config["site"]) == {"layer": 1, "hook": "resid_pre"}
    entries = history(found)
    for sae in ("base-standard-w64-l1_1-s0", "chat-standard-w64-l1_1-s0"):
        losses = [entry[f"train/{sae}/loss"] for entry in entries if f"train/{sae}/loss" in entry]
        log = [json.loads(line)["loss"] for line in (run / "saes" / sae / "train_log.jsonl").read_text().splitlines()]
        assert losses == pytest.approx(log)
    logged = {key.split(".")[0] for entry in entries for key in entry}
    assert "eval/cross_eval/rows" in logged and "eval/cross_eval/transfer" in logged
    figures = {path.stem for path in (run / "report" / "figures").glob("*.png")}
    assert figures and {f"figures/{name}" for name in figures} <= logged
    artifacts = {r.request.log_artifact.artifact.name for r in found if r.request.HasField("log_artifact")}
    artifacts |= {record.artifact.name for record in found if record.HasField("artifact")}
    assert {"sae-transfer-base-standard-w64-l1_1-s0", "sae-transfer-chat-standard-w64-l1_1-s0"} <= artifacts


def test_a_run_that_was_stopped_continues_as_one_wandb_run_without_gap_or_repeat(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"tracking": {"wandb": "offline"}, "train": {"tokens": 2048, "batch_size": 16, "models": ["base"]}}
    study = load_study(write_study(tmp_path, *llama_pair, text_file, **sections))
    batch = ActivationStream.batch

    def signalled(self: ActivationStream, n: int) -> object:
        if n == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, n)

    with monkeypatch.context() as patch, signals.installed():
        patch.setattr(ActivationStream, "batch", signalled)
        with pytest.raises(signals.Stopped):
            run_stages(study, tmp_path / "run", ("train",))
    time.sleep(1)  # wandb names the files of a run by the second
    run_stages(study, tmp_path / "run", ("train",))
    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1, "the id stands in the name"
    sae = "base-standard-w64-l1_1-s0"
    steps = [[e[f"train/{sae}/step"] for e in history(records_in(path)) if f"train/{sae}/step" in e] for path in files]
    assert steps == [list(range(1, 51)), list(range(51, 129))]


def test_online_without_a_login_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with open_tracker("online", project="p", entity=None, name="n", config={}, directory=tmp_path) as tracker:
        tracker.log_curve("sae", {"tokens": 1, "loss": 2.0})
    assert "no one is logged in" in caplog.text
    assert {"train/sae/loss": 2.0}.items() <= history(records(tmp_path))[0].items()


WITH_WANDBS_PROCESS = """
import logging, os, signal, sys, time
from pathlib import Path
from sae_transfer import signals
from sae_transfer.tracking import open_tracker
logging.basicConfig(format="%(message)s")
with signals.installed():
    try:
        directory = Path(sys.argv[1])
        with open_tracker("offline", project="p", entity=None, name="n", config={}, directory=directory) as tracker:
            tracker.log_curve("a", {"tokens": 1, "loss": 1.0})
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            (core,) = [pid for pid in children if "wandb" in Path(f"/proc/{pid}/cmdline").read_text()]
            with signals.deferred():
                for pid in (core, os.getpid()):
                    os.kill(int(pid), int(sys.argv[2]) if pid == core else signal.SIGTERM)
                time.sleep(1)
                for loss in (2.0, 3.0):
                    tracker.log_curve("a", {"tokens": loss, "loss": loss})
    except signals.Stopped as stop:
        sys.exit(stop.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="wandb's process is found below /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_wandbs_own_process_ends_first_the_exit_code_is_the_same_and_it_is_said_once(
    number: signal.Signals, tmp_path: Path
) -> None:
    # as where a scheduler signals all processes of a job
    script = [sys.executable, "-c", WITH_WANDBS_PROCESS, tmp_path, str(int(number))]
    # wandb would share the process that a test before this one has started
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("it is told no more") == 1


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    with open_tracker("disabled", project="p", entity=None, name="n", config={}, directory=tmp_path) as tracker:
        assert isinstance(tracker, NoTracker)
        tracker.log_curve("sae", {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_an_artifact_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.Api", lambda timeout: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(StudyError, match="the wandb artifact cannot be had"):
        download_artifact("someone/project/sae:v0", tmp_path)


def test_the_processes_of_base_and_chat_have_a_wandb_run_each(tmp_path: Path) -> None:
    for part in ("base", "chat", "base"):
        with open_tracker("offline", project="p", entity=None, name="n", config={}, directory=tmp_path, part=part):
            pass
    ids = [json.loads((tmp_path / f"wandb-{part}.json").read_text())["id"] for part in ("base", "chat")]
    assert ids[0] != ids[1]
    found = {path.name.split("-")[-1] for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert found == {f"{name}.wandb" for name in ids}
