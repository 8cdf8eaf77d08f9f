from pathlib import Path
from typing import Any

import pytest

from sae_transfer.cost.device import find_device
from sae_transfer.sweep.cells import Cell, expand
from sae_transfer.sweep.costs import job_costs
from sae_transfer.sweep.file import load_sweep
from sae_transfer.sweep.jobs import Job, plan_jobs, read_jobs, write_jobs
from tests.sweep.sweeps import write_sweep

Pair = tuple[Path, Path]
FINETUNE = {"tokens": [1024], "batch_size": 64}


def cells_of(directory: Path, pair: Pair, text: Path, grid: dict[str, list[Any]], **sections: Any) -> list[Cell]:
    return expand(load_sweep(write_sweep(directory, pair, text, grid, **sections)))


def of_kind(jobs: list[Job], kind: str) -> list[Job]:
    return [job for job in jobs if job.kind == kind]


def test_cells_that_can_share_a_stream_train_in_one_job_and_are_evaluated_alone(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    grid = {"site.layer": [0, 1], "saes.widths": [[64], [128]], "saes.seeds": [[0], [1]]}
    cells = cells_of(tmp_path, llama_pair, text_file, grid, finetune=FINETUNE)
    jobs = plan_jobs(cells)
    layer = {cell.id: cell.study.site.layer for cell in cells}
    for kind in ("train-base", "train-chat", "finetune"):
        groups = [{layer[cell] for cell in job.cells} for job in of_kind(jobs, kind)]
        assert groups == [{0}, {1}], kind
        assert all(len(job.cells) == 4 for job in of_kind(jobs, kind))
    assert [job.cells for job in of_kind(jobs, "evaluate")] == [(cell.id,) for cell in cells]
    assert jobs[-1].kind == "report" and set(jobs[-1].needs) == {job.name for job in of_kind(jobs, "evaluate")}
    assert len({job.name for job in jobs}) == len(jobs) == 2 * 3 + 8 + 1


def test_the_cells_of_a_job_can_be_limited(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    cells = cells_of(tmp_path, llama_pair, text_file, {"saes.widths": [[64], [128], [256]]})
    jobs = plan_jobs(cells, cells_per_job=2)
    assert [len(job.cells) for job in of_kind(jobs, "train-base")] == [2, 1]
    assert sorted(cell for job in of_kind(jobs, "train-chat") for cell in job.cells) == sorted(c.id for c in cells)


@pytest.mark.parametrize(
    ("key", "values", "n_groups"),
    [
        ("train.tokens", ["4096", "8192"], 2),
        ("train.batch_size", [64, 128], 2),
        ("train.drop_norm_above", [10, 20], 2),
        ("tokens.seed", [0, 1], 2),
        ("evaluate.tokens", [1024, 2048], 2),  # held out first, so that the training tokens are others
        ("finetune.tokens", [[1024], [2048]], 2),
        ("pair.dtype", ["float32", "bfloat16"], 2),
        ("train.lr", [1e-3, 1e-4], 2),  # one schedule a stream
        ("train.lr_decay", [0, 0.1], 2),
        ("train.l1_warmup", [0, 0.1], 2),
        ("finetune.lr_warmup", [0, 0.1], 2),
        ("finetune.lr_decay", [0, 0.1], 2),
        ("saes.seeds", [[0], [1]], 1),
        ("finetune.control", [True, False], 1),
        ("evaluate.scale", [["matched"], ["raw"]], 1),
    ],
)
def test_what_separates_cells_into_streams(
    key: str, values: list[Any], n_groups: int, llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    jobs = plan_jobs(cells_of(tmp_path, llama_pair, text_file, {key: values}, finetune=FINETUNE))
    assert len(of_kind(jobs, "train-base")) == n_groups


def test_jobs_need_what_they_read(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    jobs = plan_jobs(cells_of(tmp_path, llama_pair, text_file, {"site.layer": [1]}, finetune=FINETUNE))
    base, chat, tune, evaluate, report = jobs
    assert (base.needs, chat.needs) == ((), ())
    assert tune.needs == (base.name, chat.name)
    assert set(evaluate.needs) == {base.name, chat.name, tune.name}
    assert report.needs == (evaluate.name,)
    without = plan_jobs(cells_of(tmp_path, llama_pair, text_file, {"train.models": [["base"]]}))
    assert [job.kind for job in without] == ["train-base", "evaluate", "report"]


def test_studies_of_external_saes_have_no_training_jobs(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    external = {"name": "theirs", "trained_on": "base", "path": str(tmp_path)}
    jobs = plan_jobs(
        cells_of(tmp_path, llama_pair, text_file, {"site.layer": [0, 1]}, saes=None, external_saes=external)
    )
    assert [job.kind for job in jobs] == ["evaluate", "evaluate", "report"]
    assert jobs[0].needs == ()


def test_commands_are_what_a_person_could_type(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    instruct = {"dataset": "demo:instructions", "n": 2}
    cells = cells_of(
        tmp_path, llama_pair, text_file, {"saes.widths": [[64], [128]]}, finetune=FINETUNE, instruct=instruct
    )
    base, _, tune, evaluate, _, report = plan_jobs(cells)
    first, second = (str(tmp_path / "cells" / cell.id / "study.yaml") for cell in cells)
    assert base.command(tmp_path, base.cells) == ["train", first, second, "--here", "--model", "base"]
    assert tune.command(tmp_path, tune.cells[1:]) == ["finetune", second, "--here"]
    stages = "--stage cross-eval --stage outliers --stage instruct --stage weights --stage report"
    assert evaluate.command(tmp_path, evaluate.cells) == ["run", first, "--here", *stages.split()]
    assert report.command(tmp_path, report.cells) == ["report", str(tmp_path)]


def test_new_cells_get_jobs_of_their_own_and_earlier_jobs_stay(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    few = plan_jobs(cells_of(tmp_path, llama_pair, text_file, {"saes.widths": [[64], [128]]}))
    write_jobs(few, tmp_path)
    assert read_jobs(tmp_path) == few
    more_cells = cells_of(tmp_path, llama_pair, text_file, {"saes.widths": [[32], [64], [128]]})
    more = plan_jobs(more_cells, read_jobs(tmp_path))
    assert more[: len(few) - 1] == few[:-1]
    assert {job.cells for job in more[len(few) - 1 : -1]} == {(more_cells[0].id,)}
    assert len(more[-1].needs) == 3 and set(more[-1].cells) == {cell.id for cell in more_cells}
    assert plan_jobs(more_cells, more) == more


def test_cells_that_share_too_large_a_job_are_parted_once_it_is_not_live(
    llama_pair: Pair, text_file: Path, tmp_path: Path
) -> None:
    cells = cells_of(tmp_path, llama_pair, text_file, {"saes.widths": [[64], [128], [256]]})
    large = plan_jobs(cells)
    assert plan_jobs(cells, large, 3) == large
    for live in large[:-1]:
        assert plan_jobs(cells, large, 1, live=[live.name]) == large, "it works on them"
    trained = [job.name for job in large if job.kind.startswith("train")]
    assert plan_jobs(cells, large, 1, done=trained) == large
    parted = plan_jobs(cells, large, 1, live=["report"], done=trained[:1])
    assert parted == plan_jobs(cells, cells_per_job=1)
    assert plan_jobs(cells, parted, None) == parted
    names = {job.name for job in parted}
    assert all(need in names for job in parted for need in job.needs)


def test_a_job_costs_what_a_study_with_all_its_saes_would(llama_pair: Pair, text_file: Path, tmp_path: Path) -> None:
    def hours_of(grid: dict[str, list[Any]]) -> dict[str, float]:
        cells = cells_of(tmp_path, llama_pair, text_file, grid, finetune=FINETUNE)
        jobs = plan_jobs(cells)
        costs = job_costs(jobs, {cell.id: cell.study for cell in cells}, find_device("cpu"), gpu=False)
        return {job.kind: costs[job.name].hours for job in jobs if job.kind != "report"}

    apart, together = hours_of({"saes.widths": [[64], [128]]}), hours_of({"saes.widths": [[64, 128]]})
    assert apart["train-base"] == pytest.approx(together["train-base"])
    assert apart["finetune"] == pytest.approx(together["finetune"])
    assert apart["evaluate"] < together["evaluate"], "each cell is evaluated by itself"
