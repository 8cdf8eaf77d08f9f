"""What a study costs, from its file and a config.json alone.

Tokenization, rollouts, the instruct stage (some thousand tokens) and downloads are not counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from sae_transfer.config import SAESpec, Study
from sae_transfer.cost.device import Device
from sae_transfer.cost.memory import Memory, evaluation_memory, training_memory
from sae_transfer.cost.shape import ModelShape, sae_params
from sae_transfer.cost.work import (
    Part,
    Precision,
    adam_part,
    head_part,
    is_sparse,
    layers_part,
    reconstruct_part,
    sae_step_part,
    stream_part,
)

CHECKPOINT_BYTES = 12  # a parameter: weight and two moments, float32
CHECKPOINTS_KEPT = 2
SWEPT_THRESHOLDS = 8  # of the stage outliers, at most
# How much of what a device sustains on large products and copies a stage reaches: the least, the middle, the most.
REALISED = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Stage:
    """One stage of a study.

    Attributes:
        name: training, fine-tuning, evaluation or outliers.
        parts: Its work.
        memory: While it holds most.
    """

    name: str
    parts: tuple[Part, ...]
    memory: Memory

    def hours(self, device: Device) -> float:
        """On a device that is always busy; real runs take this divided by `REALISED`."""
        return sum(part.seconds(device) for part in self.parts) / 3600


@dataclass(frozen=True)
class Disk:
    """Bytes in the run directory; downloaded models are not in it.

    Attributes:
        tokens: Sequences, 2 bytes a token where all ids fit, else 4.
        saes: Finished SAEs, float32.
        checkpoints: Weights and moments of the SAEs that train on one stream, twice.
        activations: Of both models at the site, float32, while they are evaluated.
    """

    tokens: float
    saes: float
    checkpoints: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Cost:
    """What a study costs.

    Attributes:
        sae_params: Parameters of each SAE, by `SAESpec.name`.
        stages: Those that the study has, in order.
        disk: In the run directory.
    """

    sae_params: dict[str, int]
    stages: tuple[Stage, ...]
    disk: Disk

    def stage(self, name: str) -> Stage | None:
        """One of the stages, where the study has it."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def peak(self) -> Stage | None:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total, default=None)

    def hours(self, device: Device) -> float:
        """Of all stages, on a device that is always busy."""
        return sum(stage.hours(device) for stage in self.stages)


def estimate(study: Study, shape: ModelShape, *, gpu: bool = True) -> Cost:
    """Add up what a study costs.

    Args:
        study: The study.
        shape: Of its models, which are equal in shape.
        gpu: Whether it runs on one, which decides what `auto` means for precisions.

    Returns:
        The cost.
    """
    specs = study.sae_specs()
    params = {spec.name: sae_params(spec, shape.d_model) for spec in specs}
    n_sets, streams = _sets(study)
    stages = [*_training_stages(study, shape, gpu=gpu)]
    if specs or study.external_saes:
        stages += [_evaluation(study, shape, gpu=gpu), _outliers(study, shape, gpu=gpu)]
    all_params = sum(params.values())
    n_tokens = study.n_training_tokens + study.evaluate.tokens
    disk = Disk(
        tokens=n_tokens * (2 if shape.d_vocab <= 2**16 else 4),
        saes=n_sets * all_params * 4,
        checkpoints=streams * all_params * CHECKPOINT_BYTES * CHECKPOINTS_KEPT,
        activations=2 * 4 * study.evaluate.tokens * shape.d_model,
    )
    return Cost(params, tuple(stages), disk)


def training_parts(
    study: Study, shape: ModelShape, specs: Sequence[SAESpec], n_tokens: int, batch_size: int, *, gpu: bool
) -> tuple[Part, ...]:
    """SAEs on one stream of one model: the model up to the site, steps, Adam."""
    steps = n_tokens // batch_size
    precision = products_precision(study, gpu=gpu)
    work = [_to_site(study, shape, gpu=gpu).times(n_tokens), stream_part(shape, len(specs)).times(n_tokens)]
    for spec in specs:
        l0 = spec.sparsity_value if is_sparse(spec, gpu=gpu) else None
        work.append(sae_step_part(spec, shape.d_model, precision, l0).times(n_tokens))
        work.append(adam_part(spec, shape.d_model).times(steps))
    return _merged(work)


def model_precision(study: Study, *, gpu: bool, training: bool) -> Precision:
    """Of the language model; `pair.dtype: auto` is bfloat16 for training on a GPU alone."""
    dtype = study.pair.dtype
    return ("bfloat16" if gpu and training else "float32") if dtype == "auto" else dtype


def products_precision(study: Study, *, gpu: bool) -> Precision:
    """Of the dense products of an SAE's step."""
    if study.compute.autocast == "bfloat16" or (study.compute.autocast == "auto" and gpu):
        return "bfloat16"
    return "tf32" if gpu else "float32"


def stream_memory(study: Study, shape: ModelShape, specs: Sequence[SAESpec], *, finetuning: bool, gpu: bool) -> Memory:
    """While some of the study's SAEs are trained, or fine-tuned beside their controls, on one stream."""
    tune = study.finetune if finetuning else None
    return training_memory(
        study,
        shape,
        [*specs, *specs] if tune and tune.control else specs,
        n_tokens=max(tune.tokens) if tune else study.train.tokens,
        batch_size=tune.batch_size if tune else study.train.batch_size,
        precision=model_precision(study, gpu=gpu, training=True),
        autocast=products_precision(study, gpu=gpu) == "bfloat16",
        gpu=gpu,
    )


def _training_stages(study: Study, shape: ModelShape, *, gpu: bool) -> Iterator[Stage]:
    specs, train, tune = study.sae_specs(), study.train, study.finetune
    if not specs:
        return
    one_model = training_parts(study, shape, specs, train.tokens, train.batch_size, gpu=gpu)
    work = [part.times(len(train.models)) for part in one_model]
    if study.norm_scale is None:  # of both models, whichever get SAEs
        work.append(_to_site(study, shape, gpu=gpu).times(2 * min(train.scale_tokens, train.tokens)))
    yield Stage("training", _merged(work), stream_memory(study, shape, specs, finetuning=False, gpu=gpu))
    if tune is not None:
        on_stream = [*specs, *specs] if tune.control else specs
        work = [p for n in tune.tokens for p in training_parts(study, shape, on_stream, n, tune.batch_size, gpu=gpu)]
        yield Stage("fine-tuning", _merged(work), stream_memory(study, shape, specs, finetuning=True, gpu=gpu))


def _to_site(study: Study, shape: ModelShape, *, gpu: bool) -> Part:
    """The model up to the site in training, a token."""
    precision = model_precision(study, gpu=gpu, training=True)
    return layers_part(shape, study.site.n_layers_below, study.tokens.context_size, precision)


def _evaluation(study: Study, shape: ModelShape, *, gpu: bool) -> Stage:
    """Each model up to the site once, and on from it once clean and once for each splice.

    Mean and zero ablation of a whole site between layers make all positions equal, and cost nothing to speak of.
    """
    evaluate = study.evaluate
    n_sets, _ = _sets(study)
    widths = n_sets * [spec.d_sae for spec in study.sae_specs()]
    n_saes = len(widths) + len(study.external_saes)
    n_spliced = len(evaluate.outliers) * len(evaluate.scale) * n_saes
    return _evaluating("evaluation", study, shape, widths, n_saes, n_spliced, len(evaluate.outliers), gpu=gpu)


def _outliers(study: Study, shape: ModelShape, *, gpu: bool) -> Stage:
    """One SAE of each model under several thresholds, and a pass up to the site."""
    specs = study.sae_specs()[:1]
    sides = set(study.train.models) if specs else {sae.trained_on for sae in study.external_saes}
    widths = len(sides) * [spec.d_sae for spec in specs]
    return _evaluating(
        "outliers", study, shape, widths, len(sides), SWEPT_THRESHOLDS * len(sides), SWEPT_THRESHOLDS, gpu=gpu
    )


def _evaluating(
    name: str,
    study: Study,
    shape: ModelShape,
    widths: Sequence[int],
    n_saes: int,
    n_spliced: int,
    n_policies: int,
    *,
    gpu: bool,
) -> Stage:
    """On both models; external SAEs, whose width is not known here, count as passes alone."""
    precision, context = model_precision(study, gpu=gpu, training=False), study.tokens.context_size
    is_residual = study.site.hook.startswith("resid")
    n_ablated = 0 if is_residual else 1 + n_policies
    restarts = study.site.hook in ("resid_pre", "resid_post")
    n_above = shape.n_layers - (study.site.n_layers_below if restarts else 0)
    above = layers_part(shape, n_above, context, precision)
    head = head_part(shape, precision)
    work = [
        layers_part(shape, study.site.n_layers_below, context, precision),
        *[above, head_part(shape, precision, products=2)],
        *[part.times(n_spliced + n_ablated) for part in (above, head)],
        *(reconstruct_part(shape.d_model, width).times(len(study.evaluate.scale)) for width in widths),
    ]
    memory = evaluation_memory(study, shape, widths, precision=precision, gpu=gpu)
    return Stage(name, _merged([part.times(2 * study.evaluate.tokens) for part in work]), memory)


def _sets(study: Study) -> tuple[int, int]:
    """How many times the study's SAEs are made in all, and how many times at most on one stream."""
    tune = study.finetune
    n_tuned = len(tune.tokens) * (1 + tune.control) if tune else 0
    return len(study.train.models) + n_tuned, 2 if tune and tune.control else 1


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts of one name and precision together, in the order of their first."""
    merged: dict[tuple[str, str], Part] = {}
    for part in parts:
        key = (part.name, part.precision)
        merged[key] = merged[key] + part if key in merged else part
    return tuple(merged.values())
