"""Training as passes over a stream of activations; studies that share a stream share its passes.

The language model is most of the cost of training, so SAEs of several studies with the same models, site and token set
are trained on one pass, each in its own study's run directory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.saes.stream import ActivationStream
from sae_transfer.saes.training import Diverged, Trainee, is_trained, train_saes
from sae_transfer.throughput import Throughput


@dataclass(frozen=True)
class Pass:
    """What one study trains on one pass over a stream.

    Attributes:
        label: For the progress line, and to name the pass in messages.
        settings: All that batches and steps depend on besides the SAEs, labelled; studies share a pass when these are
            equal.
        open_stream: Device and where to count time -> the stream; loads the language model.
        trainees: Device -> SAEs, in scaled space; the settings of the pass are added to their identities.
        options: Further arguments of `train_saes`.
    """

    label: str
    settings: Mapping[str, Any]
    open_stream: Callable[[str, Throughput], ActivationStream]
    trainees: Callable[[str], list[Trainee]]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One study's stage of training.

    Attributes:
        where: The run directory, for messages.
        is_due: Whether it has to be done; refuses changed inputs, and forgets the old record.
        adopt: Makes the run directory the study's; called once no checkpoint there refuses it.
        finish: Writes the stage's record, told how many seconds it took, and at what rates its parts went.
        passes: In order; asked for when the task is due.
    """

    where: str
    is_due: Callable[[], bool]
    adopt: Callable[[], None]
    finish: Callable[[float, Throughput], None]
    passes: Callable[[], Sequence[Pass]]


def carry_out(tasks: Sequence[Task], device: str) -> None:
    """Train what is due of several studies, each pass once for all of them.

    A study whose SAEs are all stored is finished also when an SAE of another one failed.

    Args:
        tasks: Of one stage, one a study.
        device: A torch device.

    Raises:
        StudyError: The studies cannot share a stream, or an SAE failed.
    """
    started, throughput = time.monotonic(), Throughput()
    due = [task for task in tasks if task.is_due()]
    if not due:
        return
    plans = [task.passes() for task in due]
    for task, passes in zip(due[1:], plans[1:], strict=True):
        _refuse_if_different(due[0].where, plans[0], task.where, passes)

    def adopt() -> None:
        for task in due:
            task.adopt()

    missing = [0] * len(due)
    failure: Diverged | None = None
    for shared in zip(*plans, strict=True):
        not_stored, diverged = _train(shared, device, throughput, adopt)
        missing = [sum(pair) for pair in zip(missing, not_stored, strict=True)]
        failure = failure or diverged  # the other passes do not depend on it
    for task, n_missing in zip(due, missing, strict=True):
        if not n_missing:
            task.finish(time.monotonic() - started, throughput)
    if failure:
        raise failure


def _train(
    shared: Sequence[Pass], device: str, throughput: Throughput, adopt: Callable[[], None]
) -> tuple[list[int], Diverged | None]:
    """Train what several studies have on one pass; how many SAEs of each are not stored, and why.

    A function of its own: model, SAEs and moments leave the memory with it, before those of the next pass come.
    """
    failure = None
    trainees = [[_of_pass(trainee, own) for trainee in own.trainees(device)] for own in shared]
    together = list(chain.from_iterable(trainees))
    try:
        with closing(shared[0].open_stream(device, throughput)) as stream:
            train_saes(together, stream, device=device, label=shared[0].label, on_accepted=adopt, **shared[0].options)
    except Diverged as diverged:
        failure = diverged.with_traceback(None)  # which would keep all of them
    return [sum(not is_trained(trainee.directory, trainee.identity) for trainee in own) for own in trainees], failure


def _of_pass(trainee: Trainee, own: Pass) -> Trainee:
    """The trainee, its identity completed by what the pass depends on."""
    return replace(trainee, identity={**own.settings, **trainee.identity})


def carry_out_at_once(task_lists: Sequence[Sequence[Task]], devices: Sequence[str]) -> None:
    """Several lists of tasks, each on a device of its own at the same time; an error of one does not stop the others.

    Threads are enough: the work is the devices', and each training keeps its own state.

    Args:
        task_lists: Each as `carry_out` takes it.
        devices: As many.

    Raises:
        StudyError: As `carry_out`; the first one, when all have ended.
    """
    with signals.deferred(), ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(carry_out, tasks, device) for tasks, device in zip(task_lists, devices, strict=True)]
    for future in futures:
        future.result()


def _refuse_if_different(leader: str, ours: Sequence[Pass], other: str, theirs: Sequence[Pass]) -> None:
    differ = [] if len(ours) == len(theirs) else ["number of budgets"]
    for mine, yours in zip(ours, theirs, strict=False):
        labels = {*mine.settings, *yours.settings}
        differ += sorted(label for label in labels if mine.settings.get(label) != yours.settings.get(label))
    if differ:
        raise StudyError(
            f"{leader} and {other} cannot be trained on one stream; they differ in {', '.join(dict.fromkeys(differ))}",
            "train them one by one",
        )
