"""What a study will do and what it costs, in words, before a GPU is touched; no weights are loaded."""

from collections.abc import Iterator

from sae_transfer.config import Study
from sae_transfer.cost import Memory, estimate, hours, model_shape
from sae_transfer.models.pair import resolve_pair

GIB = 2**30


def describe(study: Study, *, tflops: float, gbps: float) -> Iterator[str]:
    """The study line by line: models, tokens, SAEs, evaluation, memory, disk, hours.

    Args:
        study: The study.
        tflops: Rate of matrix products of the device, 1e12 operations a second.
        gbps: Its memory bandwidth, 1e9 bytes a second.

    Yields:
        Lines of text.

    Raises:
        StudyError: The pair does not agree, or lacks the site's layer.
    """
    pair = study.pair
    revisions = (pair.base_revision, pair.chat_revision)
    checkpoints, notes = resolve_pair((pair.base, pair.chat), revisions, study.site.hook_name, weights=False)
    base = checkpoints["base"]
    shape = model_shape(base.config)
    cost = estimate(study, shape, gpu=study.compute.device != "cpu")
    time = hours(cost, tflops, gbps)

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
    for stage, memory in (("training", cost.training_memory), ("evaluation", cost.evaluation_memory)):
        if memory.total:
            yield f"memory      {stage}: {_gib(memory.total)} on the device ({_parts(memory)})"
    disk = cost.disk
    yield f"disk        {_gib(disk.total)}, of which tokens {_gib(disk.tokens)} and SAEs {_gib(disk.saes)}"
    work = (cost.training, cost.finetuning, cost.evaluation)
    flops = sum(w.lm_flops + w.sae_flops for w in work)
    yield f"FLOPs       {flops:.2e}, of which language models {sum(w.lm_flops for w in work):.2e}"
    yield (
        f"hours       at least {time.total:.2g} at {tflops:g} TFLOP/s and {gbps:g} GB/s: training {time.training:.2g},"
        f" fine-tuning {time.finetuning:.2g}, evaluation {time.evaluation:.2g}"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.2f} GiB"


def _parts(memory: Memory) -> str:
    named = {"model": memory.lm, "SAEs": memory.saes, "buffers": memory.buffer, "features": memory.temporaries}
    return ", ".join(f"{name} {_gib(value)}" for name, value in named.items())
