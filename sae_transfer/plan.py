"""What a study will do and what it costs, in words, before a GPU is touched; no weights are loaded."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sae_transfer.config import Study
from sae_transfer.cost.device import Device
from sae_transfer.cost.estimate import REALISED, Stage, estimate
from sae_transfer.cost.fit import fits, proposals
from sae_transfer.cost.memory import Memory
from sae_transfer.cost.shape import model_shape
from sae_transfer.errors import StudyError
from sae_transfer.models.pair import Checkpoint, resolve_pair
from sae_transfer.study import read_json

GIB = 2**30


def describe(study: Study, device: Device, *, gpu: bool) -> Iterator[str]:
    """The study line by line: models, tokens, SAEs, evaluation, memory, disk, hours.

    Args:
        study: The study.
        device: What it is to run on.
        gpu: Whether that is a GPU, which decides what `auto` means for precisions.

    Yields:
        Lines of text.

    Raises:
        StudyError: The pair does not agree, or lacks the site's layer or hook point, or an SAE on disk is none for it.
    """
    pair = study.pair
    revisions = (pair.base_revision, pair.chat_revision)
    checkpoints, notes = resolve_pair((pair.base, pair.chat), revisions, study.site.hook_name, weights=False)
    base = checkpoints["base"]
    if study.site.hook not in ("resid_pre", "resid_post"):  # which every decoder has
        _refuse_missing_hook_point(base, study.site.hook_name)
    for sae in study.external_saes:
        if sae.path:
            _refuse_other_width(Path(sae.path), base.d_model)
    shape = model_shape(base.config)
    cost = estimate(study, shape, gpu=gpu)

    yield f"study {study.name}: nothing wrong with it"
    yield f"models      {pair.base} and {pair.chat}, {base.model_class}, {shape.n_params / 1e6:,.1f}M parameters each"
    for note in notes:
        yield f"  they differ in {note}"
    yield f"site        {study.site.hook_name} of {base.n_layers} layers, d_model {base.d_model}"
    yield (
        f"tokens      {study.evaluate.tokens:,} to evaluate and {study.n_training_tokens:,} to train on, from"
        f" {study.tokens.dataset}, in sequences of {study.tokens.context_size}"
    )
    for name, n_params in cost.sae_params.items():
        yield f"SAE         {name} on {' and '.join(study.train.models)}: {n_params / 1e6:,.1f}M parameters each"
    for sae in study.external_saes:
        yield f"SAE         {sae.name}, trained on {sae.trained_on}, from {sae.path or f'{sae.release} {sae.id}'}"
    evaluate = study.evaluate
    yield (
        f"evaluation  every SAE on both models; outliers {' and '.join(evaluate.outliers)}"
        f" (threshold {evaluate.outlier_threshold}), {' and '.join(evaluate.scale)} scale"
    )
    disk = cost.disk
    yield f"disk        {_gib(disk.total)}, of which tokens {_gib(disk.tokens)} and SAEs {_gib(disk.saes)}"
    flops = {p.name: 0.0 for stage in cost.stages for p in stage.parts}
    for part in (part for stage in cost.stages for part in stage.parts):
        flops[part.name] += part.flops
    yield f"FLOPs       {sum(flops.values()):.2e}, of which language models {flops.get('language model', 0):.2e}"
    rates = f"{device.tflops:.3g} TFLOP/s, {device.tflops_float32:.3g} in float32, {device.gbps:,.4g} GB/s"
    yield f"device      {device.name}: {rates}, {device.gib:,.4g} GiB"
    for stage in cost.stages:
        memory = stage.memory
        verdict = "fits" if fits(stage, device) else "DOES NOT FIT"
        yield f"memory      {stage.name}: {_gib(memory.total)}, {verdict} ({_parts(memory)})"
        if not fits(stage, device):
            for change in proposals(study, shape, stage, device, gpu=gpu):
                yield f"  would fit: {change}"
    for stage in cost.stages:
        yield f"hours       {stage.name}: {_range(stage.hours(device))} ({_times(stage, device)})"
    total = cost.hours(device)
    yield f"hours       in all: {_range(total)}; at least {_duration(total)}, were the device always busy"
    yield f"hours       not counted: {', '.join(_not_counted(study))}"


def _not_counted(study: Study) -> Iterator[str]:
    yield "reading and tokenizing the dataset"
    if study.instruct is not None:
        yield "answers to instructions and their evaluation"
    if study.finetune is not None and study.finetune.data == "rollouts":
        yield "the answers that SAEs are fine-tuned on"
    yield "weights, report, and loading what is used"


def _refuse_other_width(directory: Path, d_model: int) -> None:
    """Refuse an SAE of another width, or none: evaluation would, after the training. Its weights are not looked at."""
    d_in = read_json(directory / "cfg.json").get("d_in")
    if d_in != d_model:
        found = "no cfg.json of SAELens" if d_in is None else f"d_in {d_in}"
        raise StudyError(
            f"external_saes: {directory}: got {found}; expected an SAE with d_in {d_model}, the site's d_model",
            "name a directory with cfg.json and sae_weights.safetensors, of an SAE for a model of this pair",
        )


def _refuse_missing_hook_point(checkpoint: Checkpoint, hook_name: str) -> None:
    """Run the model without its weights, and see whether the hook fires; parallel blocks have no resid_mid."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sae_transfer.models.splice import BridgeSplicer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.directory))
    try:
        BridgeSplicer(model.eval(), hook_name, checkpoint.directory)
    except StudyError as error:
        if str(error).startswith("site.hook"):  # some adapters need weights to split: no verdict then
            raise


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.2f} GiB"


def _range(bound: float) -> str:
    least, middle, most = REALISED
    return f"{_duration(bound / middle)} ({_duration(bound / most)} to {_duration(bound / least)})"


def _times(stage: Stage, device: Device) -> str:
    seconds = {part.name: 0.0 for part in stage.parts}
    for part in stage.parts:
        seconds[part.name] += part.seconds(device)
    return ", ".join(f"{name} {_duration(value / 3600 / REALISED[1])}" for name, value in seconds.items())


def _duration(hours: float) -> str:
    unit, size = next(((u, s) for u, s in (("h", 1), ("min", 60)) if hours * s >= 1), ("s", 3600))
    return f"{hours * size:.2g} {unit}"


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {_gib(value)}" for name, value in asdict(memory).items())
