"""Bytes on the device at once, stage by stage: what the code holds when it holds most."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sae_transfer.config import SAESpec, Study
from sae_transfer.cost.shape import ModelShape, sae_params
from sae_transfer.cost.work import BY_HAND, BYTES, Precision, is_sparse

# Interpreter and libraries on a CPU (resident, measured); context, kernels and workspaces on a GPU.
LIBRARIES = {"cpu": 0.6 * 2**30, "gpu": 2**30}
TRAINED_BYTES, GRADIENT_BYTES = 12, 4  # a parameter: weight and two moments; its gradient while it is there; float32
BLOCK_VALUES = 2**29  # activations of the training stream held at once: 2 GiB in float32
PASS_TOKENS = {"cpu": 2_048, "gpu": 16_384}  # that run up to the site at once in training
# While SAEs are evaluated: tokens of one pass of the model (a sequence at least), values of [tok d_sae] (256 tokens at
# least), and of a tile of logits.
EVALUATED_TOKENS, EVALUATED_FEATURES = {"cpu": 2**10, "gpu": 2**14}, {"cpu": 2**20, "gpu": 2**26}
LOGITS = {"cpu": 2**19, "gpu": 2**26}
# Elements of [tok d_sae] at once in a step by hand; [batch d_sae] alive at once in SAELens's autograd, which took 17 to
# 21 GB at batch 4096 and width 131072.
STEP_ELEMENTS, AUTOGRAD_ALIVE = {"cpu": 2**21, "gpu": 2**30}, 10
SCORE_BYTES = 11  # of an attention score where attention is not fused: measured 8.5 to 9.9 in float32, 10.8 in bfloat16
# The share of features taken for dead, and SAELens's number of steps before the first can be. To revive them topk and
# batchtopk hold, in float32: by hand four arrays [batch dead] and three [dead d_model], by autograd four [batch d_sae].
DEAD_SHARE, DEAD_AFTER = 0.5, 1000


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at once; on a CPU, resident.

    Attributes:
        libraries: What is there before any work.
        model: Weights of one language model.
        saes: Training: weights and moments of all SAEs of one model, and the gradients that are there at once.
            Evaluation: weights of all SAEs.
        activations: Training: the block of activations, and on a GPU in bfloat16 the next one and the passes that make
            it. Evaluation: residuals, reconstructions and hidden states of the sequences at hand, and on a CPU the
            activations of both models, which are mapped from disk.
        passes: Temporaries of a pass of the language model.
        features: `[tok d_sae]` of one SAE.
    """

    libraries: float
    model: float
    saes: float
    activations: float
    passes: float
    features: float

    @property
    def total(self) -> float:
        """Bytes in all; passes and features are not alive together."""
        return sum(astuple(self)) - min(self.passes, self.features)


def training_memory(
    study: Study,
    shape: ModelShape,
    specs: Sequence[SAESpec],
    *,
    n_tokens: int,
    batch_size: int,
    precision: Precision,
    autocast: bool,
    gpu: bool,
) -> Memory:
    """While SAEs are trained on one stream.

    Args:
        study: For the site and the sequences.
        shape: Of the model.
        specs: The SAEs on the stream.
        n_tokens: Of the stream.
        batch_size: Activations a step.
        precision: Of the model.
        autocast: Whether dense products of the SAEs are in bfloat16.
        gpu: Where.

    Returns:
        The memory.
    """
    n_bytes = BYTES[precision]
    params = [sae_params(spec, shape.d_model) for spec in specs]
    # the gradients of a step by hand stay on a CPU, any others go with their step
    stays = [not gpu and _is_by_hand(spec, gpu=gpu) for spec in specs]
    gradients = sum(n for n, stay in zip(params, stays, strict=True) if stay)
    gradients += max((n for n, stay in zip(params, stays, strict=True) if not stay), default=0)
    # in bfloat16, the encoder's share of the weights and, where dense products read it, the decoder's
    casts = [n * (1 if is_sparse(spec, gpu=gpu) else 2) for n, spec in zip(params, specs, strict=True)]
    cast = max(casts) if autocast else 0
    positions = min(BLOCK_VALUES // shape.d_model, n_tokens)
    block = positions * (shape.d_model * n_bytes + 8)
    context = study.tokens.context_size
    n_at_once = min(max(1, PASS_TOKENS["gpu" if gpu else "cpu"] // context) * context, n_tokens + context)
    passes = n_at_once * _pass_bytes(study, shape, n_bytes)
    if gpu and precision == "bfloat16":  # the next block is made beside the steps
        block, passes = 2 * block + passes, 0.0
    return Memory(
        libraries=LIBRARIES["gpu" if gpu else "cpu"],
        model=weights_bytes(shape, study.site.n_layers_below, n_bytes),
        saes=sum(params) * TRAINED_BYTES + gradients * GRADIENT_BYTES + cast,
        activations=block + 4 * 4 * batch_size * shape.d_model,
        passes=passes,
        features=max(
            _step_bytes(spec, shape.d_model, batch_size, n_tokens // batch_size, autocast=autocast, gpu=gpu)
            for spec in specs
        ),
    )


def evaluation_memory(
    study: Study, shape: ModelShape, widths: Sequence[int], *, precision: Precision, gpu: bool
) -> Memory:
    """While SAEs are evaluated on one model; the number of spliced residuals does not matter, as few run at once.

    Args:
        study: For the sequences.
        shape: Of the model.
        widths: d_sae of each SAE.
        precision: Of the model.
        gpu: Where.

    Returns:
        The memory.
    """
    where = "gpu" if gpu else "cpu"
    context, widest = study.tokens.context_size, max(widths, default=0)
    n_tokens = max(context, min(study.evaluate.batch_size * context, EVALUATED_TOKENS[where]))
    n_pass = max(n_tokens, EVALUATED_TOKENS[where])  # a pass takes several residuals of few sequences
    mapped = 0 if gpu else 2 * 4 * study.evaluate.tokens * shape.d_model
    return Memory(
        libraries=LIBRARIES[where],
        model=weights_bytes(shape, shape.n_layers, BYTES[precision]),
        saes=sum(2 * shape.d_model * width + width + shape.d_model for width in widths) * 4,
        activations=(5 * n_tokens + 4 * n_pass) * shape.d_model * 4 + mapped,
        passes=max(n_pass * _pass_bytes(study, shape, BYTES[precision]), 3 * 4 * LOGITS[where]),
        features=3 * 4 * min(n_tokens * widest, max(EVALUATED_FEATURES[where], 256 * widest)),
    )


def weights_bytes(shape: ModelShape, n_layers: int, n_bytes: int) -> float:
    """A model of so many layers, with embedding, final norm and unembedding."""
    outside = shape.n_params - shape.n_layers * shape.n_params_layer
    return (outside + n_layers * shape.n_params_layer) * n_bytes


def pass_values(shape: ModelShape) -> int:
    """Values alive at once in a layer, a token: gate, input and product of the MLP, or queries, keys, values twice.

    Beside them the residual, what the norm made of it, and copies.
    """
    return 6 * shape.d_model + max(3 * shape.d_mlp, 4 * shape.d_attention + 4 * shape.d_kv)


def _pass_bytes(study: Study, shape: ModelShape, n_bytes: int) -> float:
    """Of a pass of the language model, a token."""
    # other hooks than these are TransformerLens's, which shows all scores
    is_fused = shape.fuses_attention and study.site.hook in ("resid_pre", "resid_post")
    scores = 0 if is_fused else SCORE_BYTES * shape.n_heads * study.tokens.context_size
    return pass_values(shape) * n_bytes + scores


def _is_by_hand(spec: SAESpec, *, gpu: bool) -> bool:
    return spec.architecture in BY_HAND and (spec.sparsity_key != "k" or is_sparse(spec, gpu=gpu))


def _step_bytes(spec: SAESpec, d_in: int, batch_size: int, n_steps: int, *, autocast: bool, gpu: bool) -> float:
    n_values = batch_size * spec.d_sae
    can_revive = spec.sparsity_key == "k" and n_steps > DEAD_AFTER
    if not _is_by_hand(spec, gpu=gpu):
        return (AUTOGRAD_ALIVE + 4 * can_revive) * 4 * n_values
    reviving = can_revive * 4 * DEAD_SHARE * spec.d_sae * (4 * batch_size + 3 * d_in)
    if spec.architecture != "batchtopk":  # whose choice is one of the whole batch
        n_values = min(n_values, max(STEP_ELEMENTS["gpu" if gpu else "cpu"], 256 * spec.d_sae))
    # in bfloat16 a weight's gradient has a place of its own before it is added
    third = max(n_values, d_in * spec.d_sae) if autocast and not is_sparse(spec, gpu=gpu) else n_values
    return reviving + (2 if autocast else 4) * (2 * n_values + third)
