"""The stages train and finetune: what their numbers depend on, as tasks that several studies can share."""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_transfer.config import Finetune, SAESpec
from sae_transfer.models.conversations import chat_sequences
from sae_transfer.models.pair import (
    load_model,
    load_tokenizer,
)
from sae_transfer.progress import Meter
from sae_transfer.saes.store import WEIGHTS_FILE
from sae_transfer.saes.stream import ActivationStream
from sae_transfer.saes.training import Schedule, Trainee, continued_sae, discard_sae, new_sae
from sae_transfer.stages.context import Context, dataset_digests, fingerprint_of_tokenizer
from sae_transfer.stages.passes import Pass, Task, carry_out, carry_out_at_once
from sae_transfer.stages.stored import budgeted_directories, short_count
from sae_transfer.study import digest, file_digest, replacing
from sae_transfer.throughput import Throughput

logger = logging.getLogger(__name__)

ROLLOUT_ARRAYS = ("sequences.npy", "positions.npy")  # of finetune.data: rollouts


def train(group: Sequence[Context], sides: Sequence[str]) -> None:
    """Train the SAEs of one or several studies; both models at once where there are two GPUs.

    Args:
        group: Studies that share models, site, token set and the settings of training.
        sides: Of `base`, `chat`.

    Raises:
        StudyError: They cannot share a stream, or an SAE failed; the others are stored.
    """
    group = [context for context in group if context.study.saes is not None]
    if not group:
        logger.info("train: the study trains no SAEs, nothing to do")
        return
    _prepare(group)
    task_lists = [
        [training(context, side) for context in group if side in context.study.train.models] for side in sides
    ]
    devices = group[0].devices(len(sides))
    if len(devices) > 1:
        carry_out_at_once(task_lists, devices)
        return
    for tasks in task_lists:
        carry_out(tasks, devices[0])


def finetune(group: Sequence[Context]) -> None:
    """Fine-tune the base SAEs of one or several studies, and train their controls.

    Args:
        group: Studies that share models, site, token set and the settings of fine-tuning.

    Raises:
        StudyError: They cannot share a stream, or an SAE failed; the others are stored.
    """
    group = [context for context in group if context.study.finetune is not None]
    if not group:
        logger.info("finetune: the study has no section finetune, nothing to do")
        return
    _prepare(group)
    carry_out(
        [finetuning(context, context.study.finetune) for context in group if context.study.finetune], group[0].device
    )


def _prepare(group: Sequence[Context]) -> None:
    """Make the token set and the norm scales once, for all that share them."""
    leader, *others = group
    leader.norm_scales()
    for context in others:
        context.share(leader)
        context.norm_scales()


def training(context: Context, side: str) -> Task:
    """The SAEs of one model as a task, which studies can share."""
    study, settings = context.study, context.study.train
    specs = study.sae_specs()
    weights_files = [context.run.root / "saes" / f"{side}-{spec.name}" / WEIGHTS_FILE for spec in specs]

    def inputs() -> dict[str, Any]:
        return {
            **context.inputs(side),
            "saes": [[spec.name, spec.options] for spec in specs],
            "train": settings.model_dump(mode="json", exclude={"models", "scale_tokens"}),
            "norm scale": context.norm_scales()[side],
            "dtype": [context.training_dtype, context.autocast],
        }

    def passes() -> list[Pass]:
        n_batches = settings.tokens // settings.batch_size
        warmup = round(settings.l1_warmup * n_batches)

        def trainees(device: str) -> list[Trainee]:
            return [
                _trainee(context, side, "trained", spec, _fresh(context, side, spec, warmup, device), None)
                for spec in specs
            ]

        schedule = Schedule(settings.lr, 0.0, settings.lr_decay)
        return [_pass(context, f"train {side}", side, settings.batch_size, n_batches, schedule, trainees)]

    return _task(context, f"train-{side}", inputs, passes, "train", weights_files)


def finetuning(context: Context, finetune: Finetune) -> Task:
    """Fine-tuning and its controls as a task, which studies can share."""
    study = context.study
    parents = {spec: context.run.root / "saes" / f"base-{spec.name}" for spec in study.sae_specs()}
    roles = ("finetuned", "control") if finetune.control else ("finetuned",)
    made = [path / WEIGHTS_FILE for role in roles for path in budgeted_directories(context, role, *finetune.tokens)]

    def inputs() -> dict[str, Any]:
        context.require("train-base", "the SAEs of the base model are not trained yet", "train")
        return {
            **context.inputs("chat"),
            "parents": {path.name: file_digest(path / WEIGHTS_FILE) for path in parents.values()},
            "finetune": finetune.model_dump(mode="json"),
            "train": [study.train.lr, study.train.l1_warmup, study.train.drop_norm_above],
            "norm scales": context.norm_scales(),
            "dtype": [context.training_dtype, context.autocast],
            "instruct": _rollout_settings(context, finetune),
            "content of the instructions": _instruction_digests(context, finetune),
        }

    def trainees(budget: int, device: str) -> Iterator[Trainee]:
        for spec, parent in parents.items():
            # the coefficient as in training, without its warm-up
            sae = continued_sae(parent, _fresh(context, "chat", spec, 0, device))
            yield _trainee(context, "finetuned", "finetuned", spec, sae, budget, file_digest(parent / WEIGHTS_FILE))
            if finetune.control:
                warmup = round(study.train.l1_warmup * (budget // finetune.batch_size))
                yield _trainee(context, "chat", "control", spec, _fresh(context, "chat", spec, warmup, device), budget)

    def passes() -> list[Pass]:
        _make_rollouts_to_read(context, finetune)
        schedule = Schedule(study.train.lr, finetune.lr_warmup, finetune.lr_decay)
        return [
            _pass(
                context,
                f"fine-tune {short_count(budget)}",
                "chat",
                finetune.batch_size,
                budget // finetune.batch_size,
                schedule,
                lambda device, budget=budget: list(trainees(budget, device)),
                finetune,
            )
            for budget in finetune.tokens
        ]

    return _task(context, "finetune", inputs, passes, "finetune", made)


def _rollout_settings(context: Context, finetune: Finetune | None) -> dict[str, Any] | None:
    instruct = context.study.instruct
    if finetune is None or finetune.data != "rollouts" or instruct is None:
        return None
    return instruct.model_dump(mode="json")


def _instruction_digests(context: Context, finetune: Finetune | None) -> dict[str, str] | None:
    settings = _rollout_settings(context, finetune)
    return None if settings is None else dataset_digests(settings["dataset"])


def _digests_of_rollouts(context: Context, finetune: Finetune | None) -> list[str] | None:
    if _rollout_settings(context, finetune) is None:
        return None
    return [file_digest(context.run.root / "finetune" / name) for name in ROLLOUT_ARRAYS]


def _task(
    context: Context,
    name: str,
    inputs: Callable[[], dict[str, Any]],
    passes: Callable[[], list[Pass]],
    verb: str,
    outputs: Sequence[Path],
) -> Task:
    return Task(
        where=str(context.run.root),
        is_due=lambda: context.is_due(name, inputs(), verb=verb, outputs=outputs, discard=discard_sae),
        adopt=context.adopt,
        finish=lambda seconds, throughput: context.finish(name, inputs(), seconds, throughput),
        passes=passes,
    )


def _pass(
    context: Context,
    label: str,
    side: str,
    batch_size: int,
    n_batches: int,
    schedule: Schedule,
    trainees: Callable[[str], list[Trainee]],
    finetune: Finetune | None = None,
) -> Pass:
    study, scale = context.study, context.norm_scales()[side]
    return Pass(
        label=label,
        settings={
            **context.inputs(side),
            "batch_size": batch_size,
            "batches": n_batches,
            "tokens.seed": study.tokens.seed,
            "train.drop_norm_above": study.train.drop_norm_above,
            "train.l1_warmup": study.train.l1_warmup,
            "schedule": astuple(schedule),
            "norm scale": scale,
            "dtype": [context.training_dtype, context.autocast],
            "instruct": _rollout_settings(context, finetune),
            "rollouts": _digests_of_rollouts(context, finetune),
        },
        open_stream=lambda device, throughput: _stream(
            context, side, batch_size, n_batches, finetune, device, throughput
        ),
        trainees=trainees,
        options={
            "schedule": schedule,
            "norm_scale": scale,
            "autocast": context.autocast,
            "checkpoint_every_min": study.compute.checkpoint_every_min,
            "retry_lr": context.retry_lr,
            "force": context.force,
        },
    )


def _stream(
    context: Context,
    side: str,
    batch_size: int,
    n_batches: int,
    finetune: Finetune | None,
    device: str,
    throughput: Throughput,
) -> ActivationStream:
    sequences, positions = _sequences(context, finetune)
    return ActivationStream(
        context.splicer_for_training(side, device),
        sequences,
        positions=positions,
        d_model=context.checkpoints[side].d_model,
        norm_scale=context.norm_scales()[side],
        batch_size=batch_size,
        n_batches=n_batches,
        seed=context.study.tokens.seed,
        drop_norm_above=context.study.train.drop_norm_above,
        device=device,
        # a float32 model beside the steps, which are in TF32, would give activations that depend on the moment
        prefetches=device.startswith("cuda") and context.training_dtype == "bfloat16",
        throughput=throughput,
    )


def _fresh(context: Context, side: str, spec: SAESpec, sparsity_warmup_steps: int, device: str) -> Any:
    study = context.study
    return new_sae(
        spec.architecture,
        d_in=context.checkpoints[side].d_model,
        d_sae=spec.d_sae,
        sparsity_key=spec.sparsity_key,
        sparsity_value=spec.sparsity_value,
        seed=spec.seed,
        sparsity_warmup_steps=sparsity_warmup_steps,
        options=spec.options,
        metadata={
            "model_name": getattr(study.pair, side),
            "hook_name": study.site.hook_name,
            "context_size": context.token_set.context_size,
            "prepend_bos": study.tokens.prepend_bos,
            "dataset_path": context.token_set.dataset,
        },
        device=device,
    )


def _trainee(
    context: Context, trained_on: str, role: str, spec: SAESpec, sae: Any, budget: int | None, parent: str | None = None
) -> Trainee:
    identity = {"role": role, "SAE": [spec.name, spec.options], "parent": parent}
    provenance = {
        "trained_on": trained_on,
        "role": role,
        "architecture": spec.architecture,
        "d_sae": spec.d_sae,
        "sparsity_key": spec.sparsity_key,
        "sparsity_value": spec.sparsity_value,
        "seed": spec.seed,
        "parent": f"base-{spec.name}" if role == "finetuned" else None,
        "data": context.study.finetune.data if budget and context.study.finetune else "tokens",
        "study_hash": context.study_hash(),
    }
    name = f"{trained_on}-{spec.name}" if budget is None else f"{role}-{spec.name}-{short_count(budget)}"
    return Trainee(context.run.root / "saes" / name, sae, provenance, identity, context.tracker.log_curve)


def _sequences(context: Context, finetune: Finetune | None) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
    """What the model reads while SAEs are trained, and which of its positions count."""
    if _rollout_settings(context, finetune) is None:
        return context.token_set.training, None
    directory = context.run.root / "finetune"
    sequences, positions = (np.load(directory / name, mmap_mode="r") for name in ROLLOUT_ARRAYS)
    return sequences, positions


def _make_rollouts_to_read(context: Context, finetune: Finetune) -> None:
    """The chat model's answers on which its activations are taken: kept, since they take long to make."""
    instruct = context.study.instruct
    if finetune.data == "tokens" or instruct is None:
        return
    n_tokens = max(finetune.tokens)
    inputs = {
        "chat model": context.fingerprints["chat"],
        "instruct": _rollout_settings(context, finetune),
        "content of the dataset": dataset_digests(instruct.dataset),
        "tokenizer": fingerprint_of_tokenizer(context.checkpoints["chat"]),
        "finetune.tokens": n_tokens,
        "dtype": context.evaluation_dtype,
    }
    directory = context.run.root / "finetune"
    # answers do not depend on how many are wanted
    parts = directory / f"parts-{digest({**inputs, 'finetune.tokens': None})[:12]}"

    def work() -> None:
        checkpoint = context.checkpoints["chat"]
        made = chat_sequences(
            load_model(checkpoint, dtype=context.evaluation_dtype, device=context.device),
            load_tokenizer(checkpoint),
            dataset=instruct.dataset,
            n_held_out=instruct.n,
            seed=instruct.seed,
            template=instruct.template,
            max_new_tokens=instruct.max_new_tokens,
            batch_size=instruct.batch_size,
            n_tokens=n_tokens,
            parts=parts,
            progress=Meter("rollouts to fine-tune on", n_tokens, "tokens").update,
        )
        for name, array in zip(ROLLOUT_ARRAYS, made, strict=True):
            with replacing(directory / name) as file, file.open("wb") as handle:
                np.save(handle, array)

    context.stage("finetune-rollouts", inputs, work, verb="finetune")
    for path in directory.glob("parts-*"):
        shutil.rmtree(path)
