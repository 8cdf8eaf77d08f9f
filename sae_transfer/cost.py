"""What a study costs: parameters, FLOPs, memory on the device, disk and hours, from the study and a config.json alone.

An estimate: matrix products and large reads and writes are counted. Norms, kernel launches, rollouts and the instruct
stage (some thousand tokens) are not. The hours are those of a device that is always busy.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from sae_transfer.config import SAESpec, Study
from sae_transfer.errors import StudyError

# Hugging Face's model_type -> whether embedding and unembedding are one matrix where config.json does not say.
TIED_BY_DEFAULT = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": False,
    "gemma": True,
    "gemma2": True,
    "gemma3_text": True,
    "gpt_neox": False,
    "gpt2": True,
}
ADAM_BYTES = 28  # a parameter and step: weight, gradient and two moments read, all but the gradient written, float32
TRAINED_BYTES = 16  # a parameter: weight, gradient and two moments, float32
CHECKPOINT_BYTES = 12  # a parameter: weight and two moments, float32
# [batch d_sae] float32 alive at once in a step of SAELens: 17 to 21 GB at batch 4096 and width 131072 (measured).
ALIVE_TEMPORARIES = 10
BLOCK_VALUES = 2**29  # activations of the training stream held at once: 2 GiB in float32
LOGITS_BYTES = 3 * 2**27  # three float32 slices of logits


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model.

    Attributes:
        d_model: Width of the residual stream.
        d_attention: Heads times their width.
        n_layers: Decoder layers.
        d_vocab: Token ids.
        n_params_layer: Parameters of one layer, biases and norms included.
        n_params_embedding: Token embedding, and position embedding where it is learned.
        n_params_final_norm: The norm before the unembedding.
        tied: Whether the unembedding is the token embedding.
    """

    d_model: int
    d_attention: int
    n_layers: int
    d_vocab: int
    n_params_layer: int
    n_params_embedding: int
    n_params_final_norm: int
    tied: bool

    @property
    def n_params(self) -> int:
        """All parameters; tied ones count once."""
        unembedding = 0 if self.tied else self.d_vocab * self.d_model
        return self.n_layers * self.n_params_layer + self.n_params_embedding + self.n_params_final_norm + unembedding


@dataclass(frozen=True)
class Work:
    """What a stage computes.

    Attributes:
        lm_flops: Floating-point operations of the language models.
        sae_flops: Floating-point operations of the SAEs.
        traffic_bytes: Read and written by Adam and by the `[batch d_sae]` temporaries.
    """

    lm_flops: float
    sae_flops: float
    traffic_bytes: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at once.

    Attributes:
        lm: Weights of one language model.
        saes: Training: weights, gradients and moments of all SAEs of one model. Evaluation: weights of all SAEs.
        buffer: Training: the block of activations. Evaluation: slices of logits.
        temporaries: `[batch d_sae]` of the widest SAE.
    """

    lm: float
    saes: float
    buffer: float
    temporaries: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Disk:
    """Bytes in the run directory.

    Attributes:
        tokens: Sequences, 2 bytes a token where all ids fit, else 4.
        saes: Finished SAEs, float32.
        checkpoints: Weights and moments of every SAE of `saes` while it trains.
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
        training: Of all models in `train.models`.
        finetuning: Of all budgets, controls included.
        evaluation: Of every SAE on both models; external SAEs count as passes of the language model only.
        training_memory: While the SAEs of one model train.
        evaluation_memory: While one model is evaluated.
        disk: In the run directory; downloaded models are not in it.
    """

    sae_params: dict[str, int]
    training: Work
    finetuning: Work
    evaluation: Work
    training_memory: Memory
    evaluation_memory: Memory
    disk: Disk


@dataclass(frozen=True)
class Hours:
    """Hours of each stage."""

    training: float
    finetuning: float
    evaluation: float

    @property
    def total(self) -> float:
        """Hours in all."""
        return sum(astuple(self))


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read sizes and count parameters, exactly.

    Args:
        config: The content of a checkpoint's config.json.

    Returns:
        The shape.

    Raises:
        StudyError: The model_type is not one that can be counted, or a size is missing.
    """
    kind = config.get("model_type")
    if kind not in TIED_BY_DEFAULT:
        raise StudyError(f"config.json: got model_type {kind}; expected one of {', '.join(TIED_BY_DEFAULT)}")
    try:
        tied = bool(config.get("tie_word_embeddings", TIED_BY_DEFAULT[kind]))
        if kind == "gpt2":
            d, n_layers, n_heads = config["n_embd"], config["n_layer"], config["n_head"]
            mlp = config.get("n_inner") or 4 * d
        else:
            d, n_layers, n_heads = (
                config[f"{key}"] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
            )
            mlp = config["intermediate_size"]
        d_vocab = config["vocab_size"]
        positions = config["n_positions"] * d if kind == "gpt2" else 0
    except KeyError as error:
        raise StudyError(
            f"config.json: {error.args[0]} is missing; expected the config.json of a {kind} model"
        ) from error
    head = config.get("head_dim") or d // n_heads
    q, kv = n_heads * head, (config.get("num_key_value_heads") or n_heads) * head
    if kind in ("gpt2", "gpt_neox"):
        bias = 4 * d if config.get("attention_bias", True) else 0
        layer, norm = 4 * d * d + bias + 2 * d * mlp + mlp + d + 2 * 2 * d, 2 * d
    else:
        bias = q + 2 * kv if kind == "qwen2" else (q + 2 * kv + d) if config.get("attention_bias") else 0
        bias += (2 * mlp + d) if config.get("mlp_bias") else 0
        norms = {"gemma2": 4 * d, "gemma3_text": 4 * d + 2 * head, "qwen3": 2 * d + 2 * head}.get(kind, 2 * d)
        layer, norm = 2 * d * q + 2 * d * kv + 3 * d * mlp + bias + norms, d
    return ModelShape(d, q, n_layers, d_vocab, layer, d_vocab * d + positions, norm, tied)


def sae_params(spec: SAESpec, d_in: int) -> int:
    """Parameters of one SAE: two matrices, the decoder's bias `[d_in]`, and the architecture's vectors `[d_sae]`."""
    vectors = {"gated": 3, "jumprelu": 2}.get(spec.architecture, 1)
    return 2 * d_in * spec.d_sae + d_in + vectors * spec.d_sae


def estimate(study: Study, shape: ModelShape, *, gpu: bool = True) -> Cost:
    """Add up what a study costs.

    Args:
        study: The study.
        shape: Of its models, which are equal in shape.
        gpu: Whether it runs on one, which decides what `dtype: auto` means.

    Returns:
        The cost.
    """
    specs, train, tune = study.sae_specs(), study.train, study.finetune
    params = {spec.name: sae_params(spec, shape.d_model) for spec in specs}
    all_params = sum(params.values())
    n_tuned = len(tune.tokens) * (1 + tune.control) if tune else 0
    n_sets = len(train.models) + n_tuned
    scale_tokens = 0 if study.norm_scale else min(train.scale_tokens, train.tokens)
    training = [_training(study, shape, train.tokens, train.batch_size, scale_tokens) for _ in train.models]
    tuning = [_training(study, shape, n, tune.batch_size, 0) for n in tune.tokens] if tune else []
    if tune and tune.control:
        tuning = [Work(work.lm_flops, 2 * work.sae_flops, 2 * work.traffic_bytes) for work in tuning]
    widest = max((spec.d_sae for spec in specs), default=0)
    bytes_trained = 4 if study.pair.dtype == "float32" or (study.pair.dtype == "auto" and not gpu) else 2
    bytes_evaluated = 2 if study.pair.dtype == "bfloat16" else 4
    below = shape.n_params_embedding + _layers_below(study) * shape.n_params_layer
    block = min(BLOCK_VALUES, train.tokens * shape.d_model) * bytes_trained
    batch = max(train.batch_size, tune.batch_size if tune else 0)
    evaluation_batch = study.evaluate.batch_size * study.tokens.context_size
    n_tokens = study.n_training_tokens + study.evaluate.tokens
    none = Memory(0, 0, 0, 0)
    return Cost(
        sae_params=params,
        training=_sum(training) if specs else Work(0, 0, 0),
        finetuning=_sum(tuning),
        evaluation=_evaluation(study, shape, n_sets),
        training_memory=Memory(
            below * bytes_trained, all_params * TRAINED_BYTES, block, ALIVE_TEMPORARIES * 4 * batch * widest
        )
        if specs
        else none,
        evaluation_memory=Memory(
            shape.n_params * bytes_evaluated, n_sets * all_params * 4, LOGITS_BYTES, 4 * evaluation_batch * widest
        ),
        disk=Disk(
            tokens=n_tokens * (2 if shape.d_vocab <= 2**16 else 4),
            saes=n_sets * all_params * 4,
            checkpoints=n_sets * all_params * CHECKPOINT_BYTES,
            activations=2 * 4 * study.evaluate.tokens * shape.d_model,
        ),
    )


def hours(cost: Cost, tflops: float, gbps: float) -> Hours:
    """Hours on a stated device: products at its rate, then memory traffic at its bandwidth, nothing overlapped.

    Args:
        cost: What `estimate` found.
        tflops: Rate of matrix products at the precision used, 1e12 operations a second.
        gbps: Memory bandwidth, 1e9 bytes a second.

    Returns:
        The hours; real runs take longer.
    """

    def of(work: Work) -> float:
        seconds = (work.lm_flops + work.sae_flops) / (tflops * 1e12) + work.traffic_bytes / (gbps * 1e9)
        return seconds / 3600

    return Hours(of(cost.training), of(cost.finetuning), of(cost.evaluation))


def _layers_below(study: Study) -> int:
    """Layers that run up to the site; a site within or after a layer needs that layer."""
    return study.site.layer + (study.site.hook != "resid_pre")


def _layer_flops(study: Study, shape: ModelShape) -> float:
    """FLOPs of a token in a layer: 2 a parameter, and 4 a value of the half context that causal attention sees."""
    return 2 * shape.n_params_layer + 2 * study.tokens.context_size * shape.d_attention


def _training(study: Study, shape: ModelShape, n_tokens: int, batch_size: int, scale_tokens: int) -> Work:
    """All SAEs of one model on one stream of `n_tokens`, and the tokens from which the norm is measured.

    An SAE's step is 5 products of 2 d_in d_sae FLOPs a token: encode, decode, and the gradients of the features and of
    both matrices; the input needs none unless the decoder bias is subtracted from it. The auxiliary losses of gated and
    topk are not counted. Temporaries are written and read once.
    """
    lm_flops = (n_tokens + scale_tokens) * _layers_below(study) * _layer_flops(study, shape)
    sae_flops = traffic_bytes = 0
    for spec in study.sae_specs():
        products = 5 + spec.options["apply_b_dec_to_input"]
        sae_flops += n_tokens * products * 2 * shape.d_model * spec.d_sae
        traffic_bytes += n_tokens // batch_size * sae_params(spec, shape.d_model) * ADAM_BYTES
        traffic_bytes += n_tokens * spec.d_sae * 4 * 2
    return Work(lm_flops, sae_flops, traffic_bytes)


def _evaluation(study: Study, shape: ModelShape, n_sets: int) -> Work:
    """For each model the layers up to the site once, the rest once clean, mean-ablated and for each splice.

    The rest is the layers above a site between layers, where a pass can restart, and the whole model elsewhere.
    """
    evaluate = study.evaluate
    if not study.saes and not study.external_saes:
        return Work(0, 0, 0)
    specs = study.sae_specs()
    n_saes = n_sets * len(specs) + len(study.external_saes)
    passes = 1 + len(evaluate.outliers) * (1 + len(evaluate.scale) * n_saes)
    restarts = study.site.hook in ("resid_pre", "resid_post")
    n_above = shape.n_layers - (_layers_below(study) if restarts else 0)
    above = n_above * _layer_flops(study, shape) + 2 * shape.d_model * shape.d_vocab
    below = _layers_below(study) * _layer_flops(study, shape)
    sae_flops = n_sets * sum(4 * shape.d_model * spec.d_sae for spec in specs) * len(evaluate.scale)
    n_tokens = 2 * evaluate.tokens
    return Work(n_tokens * (below + passes * above), n_tokens * sae_flops, 0)


def _sum(works: list[Work]) -> Work:
    return Work(
        sum(work.lm_flops for work in works),
        sum(work.sae_flops for work in works),
        sum(work.traffic_bytes for work in works),
    )
