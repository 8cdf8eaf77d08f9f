"""What a study file may say: every key with its type, default and effect, and which values contradict each other.

Defaults are the post's for Qwen1.5-0.5B unless the description says otherwise. `study_file.py` reads files and `--set`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sae_transfer.errors import StudyError

T = TypeVar("T")
UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
# The keys that only some architectures have, named as in SAELens; the first is the sparsity key.
OWN_KEYS = {
    "standard": ("l1_coefficient",),
    "gated": ("l1_coefficient",),
    "topk": ("k",),
    "batchtopk": ("k",),
    "jumprelu": ("l0_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth"),
}
# l1_coefficient is the post's, the others SAELens's; k and l0_coefficient have none.
OWN_DEFAULTS = {
    "standard": {"l1_coefficient": [3]},
    "gated": {"l1_coefficient": [3]},
    "jumprelu": {"jumprelu_init_threshold": 0.01, "jumprelu_bandwidth": 0.05},
}
SHORT_KEYS = {"l1_coefficient": "l1_", "k": "k", "l0_coefficient": "l0_"}


def _refuse(expected: str) -> PydanticCustomError:
    return PydanticCustomError("study", "expected {expected}", {"expected": expected})


def _not_boolean(value: Any) -> Any:
    """Pydantic takes `true` as 1."""
    if isinstance(value, bool):
        raise _refuse("a number")
    return value


def _token_count(value: Any) -> Any:
    text = str(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    number = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([kMB]?)", text)
    count = Decimal(number[1]) * UNITS[number[2]] if number else Decimal(0)
    if count <= 0 or count != int(count):
        raise _refuse("a whole number of tokens above 0, such as 98304, 400k, 1.5M or 2B")
    return int(count)


def _threshold(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise _refuse("a number above 0 (a scaled norm), or auto")
    return number


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise _refuse("no entry twice")
    return values


def _directory_name(value: str) -> str:
    if not re.fullmatch(r"[^\W_][^/\\\x00-\x1f\x7f]{0,99}", value) or value != value.strip():
        raise _refuse("a plain directory name: no slashes, a letter or digit first, at most 100 characters")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise _refuse("auto, cpu, cuda or cuda:N")
    return value


def _template(value: str) -> str:
    if value.count("{instruction}") != 1:
        raise _refuse("a text in which {instruction} stands once")
    return value


Whole = Annotated[int, BeforeValidator(_not_boolean), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_not_boolean), Field(gt=0)]
Positive = Annotated[float, BeforeValidator(_not_boolean), Field(gt=0)]
Fraction = Annotated[float, BeforeValidator(_not_boolean), Field(ge=0, le=1)]
TokenCount = Annotated[
    int,
    BeforeValidator(_token_count),
    WithJsonSchema({"type": ["integer", "string"], "pattern": r"^\d[\d_]*(\.\d+)?(e\+?\d{1,2})?\s*[kMB]?$"}),
]
Threshold = Annotated[
    float | Literal["auto"], PlainValidator(_threshold, json_schema_input_type=float | Literal["auto"])
]
Text = Annotated[str, Field(min_length=1)]
DirectoryName = Annotated[str, AfterValidator(_directory_name)]
# A single value stands for a list of one.
Several = Annotated[tuple[T, ...], BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1)]
Side = Literal["base", "chat"]
SIDES: tuple[Side, ...] = get_args(Side)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Pair(_Section):
    """The two models."""

    base: Text = Field(
        description="Base model: a directory (beside this file or in the working directory), else a hub id."
    )
    chat: Text = Field(description="Chat model fine-tuned from it: a directory or hub id; demo:chat is embedded.")
    base_revision: Text | None = Field(default=None, description="Hub commit of the base model; null takes the newest.")
    chat_revision: Text | None = Field(default=None, description="Hub commit of the chat model; null takes the newest.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 for training and float32 for evaluation on a GPU, float32 on CPU."
    )


class Site(_Section):
    """Where activations are read and spliced."""

    layer: Whole = Field(description="Layer, counted from 0.")
    hook: Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"] = Field(
        description="Residual stream before, within or after the layer, or what its attention or MLP adds."
    )

    @property
    def hook_name(self) -> str:
        """TransformerLens's name of the site, such as blocks.13.hook_resid_pre."""
        return f"blocks.{self.layer}.hook_{self.hook}"

    @property
    def n_layers_below(self) -> int:
        """Layers that run before the site is reached; one within or after a layer needs that layer."""
        return self.layer + (self.hook != "resid_pre")


class Tokens(_Section):
    """The text, and how it is packed into sequences."""

    dataset: Text = Field(
        description="Hub id (streamed), directory, .txt .json .jsonl .parquet, .npy ids [seq pos], or demo:text."
    )
    subset: Text | None = Field(default=None, description="Configuration of a hub dataset; null takes its default.")
    split: Text = Field(default="train", description="Split of a hub or saved dataset.")
    column: Text = Field(default="text", description="Column that holds the text.")
    revision: Text | None = Field(default=None, description="Hub commit of the dataset; null takes the newest.")
    context_size: Count = Field(default=2048, description="Tokens in a sequence, BOS included.")
    prepend_bos: StrictBool = Field(default=True, description="Put BOS at the start of every sequence.")
    bos_token: Text | None = Field(default=None, description="BOS; null takes the base tokenizer's bos, else its eos.")
    separator: Literal["bos", "eos", "none"] = Field(
        default="bos", description="Token between documents; bos (SAELens's default) puts outlier norms in mid-context."
    )
    seed: Whole = Field(default=0, description="Shuffles the packed sequences.")


class NormScale(_Section):
    """Norm scaling factors sqrt(d_model) / mean norm."""

    base: Positive = Field(description="Factor of the base model at the site.")
    chat: Positive = Field(description="Factor of the chat model at the site.")


class SAEGroup(_Section):
    """SAEs of one architecture: every combination of width, sparsity and seed."""

    architecture: Literal["standard", "gated", "topk", "batchtopk", "jumprelu"] = Field(
        default="standard", description="SAELens's name; standard is ReLU with an L1 penalty."
    )
    widths: Several[Count] = Field(default=(32768,), description="Numbers of features, d_sae.")
    l1_coefficient: Several[Positive] | None = Field(
        default=None, description="L1 penalties of standard and gated; [3] if absent."
    )
    k: Several[Positive] | None = Field(
        default=None, description="Active features per token (topk) or on average (batchtopk); required there."
    )
    l0_coefficient: Several[Positive] | None = Field(
        default=None, description="L0 penalties of jumprelu; required there."
    )
    jumprelu_init_threshold: Positive | None = Field(
        default=None, description="Threshold at the start, in scaled units, of jumprelu; SAELens's 0.01 if absent."
    )
    jumprelu_bandwidth: Positive | None = Field(
        default=None, description="Width of the threshold's gradient window, of jumprelu; SAELens's 0.05 if absent."
    )
    seeds: Several[Whole] = Field(
        default=(0,), description="Initializations, one SAE each; two or more give a noise floor."
    )
    apply_b_dec_to_input: StrictBool = Field(
        default=False,
        description="Subtract the decoder bias before encoding (SAELens's default is true, the post's false).",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_own_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        architecture = raw.get("architecture", "standard")
        return {**(OWN_DEFAULTS.get(architecture, {}) if isinstance(architecture, str) else {}), **raw}


class Train(_Section):
    """How SAEs are trained, all of one model on one stream."""

    models: Several[Side] = Field(default=SIDES, description="Models that get SAEs.")
    tokens: TokenCount = Field(default=400_000_000, description="Activations seen by each SAE.")
    batch_size: Count = Field(default=4096, description="Activations in a training step.")
    lr: Annotated[Positive, Field(le=1)] = Field(default=5e-5, description="Learning rate of Adam.")
    lr_decay: Fraction = Field(default=0.2, description="Last fraction of steps, over which lr falls linearly to 0.")
    l1_warmup: Fraction = Field(
        default=0.05, description="First fraction of steps, over which the sparsity penalty rises."
    )
    scale_tokens: TokenCount = Field(
        default=4_000_000,
        description="First training tokens, from which the norm scaling factor is measured, at most all (our choice).",
    )
    drop_norm_above: Annotated[Positive, Field(gt=1)] | None = Field(
        default=None,
        description="Leave activations above this multiple of the median norm out of training; null keeps all.",
    )


class Finetune(_Section):
    """Base SAEs continued on the chat model; an absent section means none."""

    tokens: Several[TokenCount] = Field(default=(5_000_000,), description="Budgets, each one full schedule of its own.")
    data: Literal["tokens", "rollouts"] = Field(
        default="tokens",
        description="tokens: training sequences (the post); rollouts: instructions and the chat model's answers.",
    )
    control: StrictBool = Field(default=False, description="Also train a chat SAE from scratch on each budget.")
    batch_size: Count = Field(default=256, description="Activations in a step.")
    lr_warmup: Fraction = Field(default=0.05, description="First fraction of steps, over which lr rises linearly.")
    lr_decay: Fraction = Field(default=0.2, description="Last fraction of steps, over which lr falls linearly to 0.")


class Evaluate(_Section):
    """How SAEs are evaluated on both models."""

    tokens: TokenCount = Field(default=98_304, description="Held-out tokens, cut to whole sequences.")
    batch_size: Count = Field(default=8, description="Sequences in a batch.")
    outlier_threshold: Threshold = Field(
        default="auto",
        description="Scaled norm above which a position is an outlier; auto (our default) finds the gap.",
    )
    outliers: Several[Literal["excluded", "kept"]] = Field(
        default=("excluded", "kept"),
        description="excluded: outliers keep their true activation; kept: they are spliced too.",
    )
    scale: Several[Literal["matched", "raw"]] = Field(
        default=("matched",),
        description="matched: both models at equal mean norm (the post); raw: as anyone who loads the SAE.",
    )
    averaging: Literal["pooled", "batch"] = Field(
        default="pooled", description="pooled: ratios of sums over all tokens; batch: mean over batches (the post)."
    )


class Instruct(_Section):
    """Evaluation on instructions and the chat model's answers; an absent section means none."""

    dataset: Text = Field(default="tatsu-lab/alpaca", description="Instructions: hub id, file, or demo:instructions.")
    n: Count = Field(default=100, description="Rows drawn; those with an input are dropped afterwards.")
    seed: Whole = Field(default=42, description="Draws the rows.")
    max_new_tokens: Count = Field(default=64, description="Longest answer, in tokens.")
    template: Annotated[str, AfterValidator(_template)] | None = Field(
        default=None, description="Prompt with {instruction} in it; null takes the tokenizer's chat template."
    )
    rollouts: Text | None = Field(
        default=None, description="JSONL of {instruction, completion} used as it is; null has the chat model answer."
    )
    batch_size: Count = Field(default=8, description="Rows in a batch; changes no number.")
    sections: Several[Literal["rollout", "user_prompt", "control"]] = Field(
        default=("rollout", "user_prompt", "control"), description="Parts of a row, each spliced and counted by itself."
    )


class ExternalSAE(_Section):
    """An SAE from elsewhere, evaluated beside ours."""

    name: DirectoryName = Field(description="Its id in tables and directories.")
    trained_on: Side = Field(description="Model whose activations it was trained on.")
    path: Text | None = Field(default=None, description="SAELens directory; or give release and id.")
    release: Text | None = Field(default=None, description="SAELens release, together with id.")
    id: Text | None = Field(default=None, description="SAE in that release.")
    scale: Positive | None = Field(
        default=None, description="It expects activations times this; null: it takes raw activations."
    )
    accept_mismatch: StrictBool = Field(
        default=False, description="Take it although its recorded model or site is not the study's."
    )


class Report(_Section):
    """What the report says."""

    margin: Positive = Field(
        default=0.05, description="Largest CE-delta gap, in nats, that counts as transfer (our choice)."
    )


class Tracking(_Section):
    """Where curves go besides the run directory."""

    wandb: Literal["disabled", "offline", "online"] = Field(default="disabled", description="wandb's own modes.")
    project: Text = Field(default="sae-transfer", description="wandb project.")
    entity: Text | None = Field(default=None, description="wandb user or team; null takes wandb's default.")


class Compute(_Section):
    """Where it runs."""

    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."
    )
    autocast: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Precision of the SAE step; auto: bfloat16 on a GPU, float32 on CPU. Weights stay float32.",
    )
    checkpoint_every_min: Positive = Field(default=15, description="Minutes between training checkpoints.")


@dataclass(frozen=True)
class SAESpec:
    """One SAE of a study, whichever model it is trained on.

    Attributes:
        architecture: SAELens's name.
        d_sae: Width.
        sparsity_key: l1_coefficient, k or l0_coefficient.
        sparsity_value: Its value; a whole number for topk.
        seed: Of the initialization.
        options: SAELens's other keys for this SAE.
    """

    architecture: str
    d_sae: int
    sparsity_key: str
    sparsity_value: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Directory-safe id, such as standard-w32768-l1_3-s0; `options` are not part of it."""
        value = int(self.sparsity_value) if self.sparsity_value == int(self.sparsity_value) else self.sparsity_value
        return f"{self.architecture}-w{self.d_sae}-{SHORT_KEYS[self.sparsity_key]}{value}-s{self.seed}"


class Contradiction(NamedTuple):
    """Values that are fine each by itself, but not together.

    Attributes:
        message: What is wrong and what would be right.
        keys: The keys it rests on, dotted, with indices of list entries; the first is the one to blame.
    """

    message: str
    keys: tuple[str, ...]


class Study(_Section):
    """A study: a model pair, a site, SAEs, and what is measured."""

    name: DirectoryName = Field(default="study", description="Names results/<name>; absent: the study file's name.")
    pair: Pair = Field(description="The two models: base and chat.")
    site: Site = Field(description="The layer and hook point.")
    tokens: Tokens = Field(description="The text for training and evaluation.")
    norm_scale: NormScale | None = Field(default=None, description="Norm scaling factors; null measures them.")
    saes: (
        Annotated[
            tuple[SAEGroup, ...],
            BeforeValidator(_listed, json_schema_input_type=SAEGroup | tuple[SAEGroup, ...]),
            Field(min_length=1),
        ]
        | None
    ) = Field(default=None, description="SAEs to train, a mapping or a list of them; null trains nothing.")
    train: Train = Field(default=Train(), description="How SAEs are trained.")
    finetune: Finetune | None = Field(default=None, description="Base SAEs continued on the chat model; null: none.")
    evaluate: Evaluate = Field(default=Evaluate(), description="How SAEs are evaluated on both models.")
    instruct: Instruct | None = Field(default=None, description="Evaluation on instruction data; null: none.")
    external_saes: Annotated[
        tuple[ExternalSAE, ...],
        BeforeValidator(_listed, json_schema_input_type=ExternalSAE | tuple[ExternalSAE, ...]),
    ] = Field(default=(), description="SAEs from elsewhere, a mapping or a list of them, evaluated beside ours.")
    report: Report = Field(default=Report(), description="What the report says.")
    tracking: Tracking = Field(default=Tracking(), description="Where curves go besides the run directory.")
    compute: Compute = Field(default=Compute(), description="Device, precision and checkpoints.")

    def sae_specs(self) -> tuple[SAESpec, ...]:
        """Every SAE that is trained on each model of `train.models`, in the file's order."""
        return tuple(spec for group in self.saes or () for spec in _expand(group))

    @property
    def n_training_tokens(self) -> int:
        """Training tokens the study needs on disk; 0 when nothing is trained. Scales are measured on some of them."""
        if self.saes is None:
            return 0
        finetune = self.finetune.tokens if self.finetune and self.finetune.data == "tokens" else ()
        return max((self.train.tokens, *finetune))

    def contradictions(self) -> Iterator[Contradiction]:
        """Everything in which the values refuse each other. `study_file.parse_study` lets no such study through."""
        context, train, finetune = self.tokens.context_size, self.train, self.finetune
        counts = [("evaluate.tokens", self.evaluate.tokens)]
        if self.saes is not None:
            counts += [("train.tokens", train.tokens), ("train.scale_tokens", train.scale_tokens)]
            if train.batch_size > train.tokens:
                yield Contradiction(
                    f"{train.batch_size} is more than all of train.tokens ({train.tokens})",
                    ("train.batch_size", "train.tokens"),
                )
        for key, tokens in counts:
            # the width of a .npy is its own, whatever context_size says
            if tokens < context and not self.tokens.dataset.endswith(".npy"):
                yield Contradiction(
                    f"{tokens} is less than one sequence (tokens.context_size is {context})",
                    (key, "tokens.context_size"),
                )
        if finetune is not None:
            if self.saes is None or "base" not in train.models:
                yield Contradiction(
                    "continues SAEs of the base model, and none is trained; expected saes, and base in train.models",
                    ("finetune", "saes", "train.models"),
                )
            if finetune.data == "rollouts" and self.instruct is None:
                yield Contradiction(
                    "rollouts are made by the section instruct, which is absent", ("finetune.data", "instruct")
                )
            if finetune.batch_size > min(finetune.tokens):
                yield Contradiction(
                    f"{finetune.batch_size} is more than all of finetune.tokens ({min(finetune.tokens)})",
                    ("finetune.batch_size", "finetune.tokens"),
                )
            if finetune.lr_warmup + finetune.lr_decay > 1:
                yield Contradiction(
                    f"warm-up ({finetune.lr_warmup}) and decay ({finetune.lr_decay}) together exceed all steps;"
                    " expected a sum of at most 1",
                    ("finetune.lr_warmup", "finetune.lr_decay"),
                )
        yield from _sae_contradictions(self.saes or ())
        yield from _external_contradictions(self)


def _expand(group: SAEGroup) -> Iterator[SAESpec]:
    sparsity_key, *options = OWN_KEYS[group.architecture]
    shared = {key: getattr(group, key) for key in ("apply_b_dec_to_input", *options)}
    for d_sae, value, seed in product(group.widths, getattr(group, sparsity_key) or (), group.seeds):
        # SAELens's topk takes an int alone.
        value = int(value) if group.architecture == "topk" else value
        yield SAESpec(group.architecture, d_sae, sparsity_key, value, seed, dict(shared))


def _sae_contradictions(groups: tuple[SAEGroup, ...]) -> Iterator[Contradiction]:
    made = Counter(spec.name for group in groups for spec in _expand(group))
    for index, group in enumerate(groups):
        at, architecture = f"saes.{index}", group.architecture
        own = OWN_KEYS[architecture]
        for key in dict.fromkeys(key for keys in OWN_KEYS.values() for key in keys):
            if key not in own and getattr(group, key) is not None:
                owners = " and ".join(name for name, keys in OWN_KEYS.items() if key in keys)
                yield Contradiction(
                    f"belongs to {owners}; the sparsity key of {architecture} is {own[0]}",
                    (f"{at}.{key}", f"{at}.architecture"),
                )
        if getattr(group, own[0]) is None:
            yield Contradiction(
                f"missing; {architecture} needs it, as in {own[0]}: [{32 if own[0] == 'k' else 1}]",
                (f"{at}.{own[0]}", f"{at}.architecture"),
            )
        if own[0] == "k" and group.k is not None:
            if max(group.k) > min(group.widths):
                yield Contradiction(
                    f"{max(group.k):g} active features do not fit in a width of {min(group.widths)}",
                    (f"{at}.k", f"{at}.architecture", f"{at}.widths"),
                )
            if architecture == "topk" and any(k != int(k) for k in group.k):
                yield Contradiction("topk needs whole numbers", (f"{at}.k", f"{at}.architecture"))
        twice = sorted({spec.name for spec in _expand(group) if made[spec.name] > 1})
        if twice:
            made.subtract({name: made[name] for name in twice})  # Said once, at the first of the entries.
            yield Contradiction(
                f"{', '.join(twice)}: made by more than one entry of saes; entries that differ in other keys than"
                " architecture, width, sparsity and seed belong in studies of their own",
                (at, *(f"saes.{i}.{key}" for i in range(len(groups)) for key in SAEGroup.model_fields)),
            )


def _external_contradictions(study: Study) -> Iterator[Contradiction]:
    names = Counter(sae.name for sae in study.external_saes)
    roles = ("base", "chat", "finetuned", "control")
    ours = tuple(f"{role}-{spec.name}" for role, spec in product(roles, study.sae_specs()))
    for index, sae in enumerate(study.external_saes):
        at = f"external_saes.{index}"
        if sae.path is not None and (sae.release is not None or sae.id is not None):
            yield Contradiction(
                "given together with release or id; expected one of the two ways",
                (f"{at}.path", f"{at}.release", f"{at}.id"),
            )
        elif sae.path is None and (sae.release is None or sae.id is None):
            yield Contradiction(
                "says not where the SAE is; expected path, or release and id",
                (at, f"{at}.path", f"{at}.release", f"{at}.id"),
            )
        if names[sae.name] > 1:
            names[sae.name] = 0  # Said once.
            yield Contradiction(
                f"{sae.name} is the name of several external SAEs",
                (f"{at}.name", *(f"external_saes.{i}.name" for i in range(len(study.external_saes)))),
            )
        if sae.name.startswith(ours):
            yield Contradiction(f"{sae.name} is the id of an SAE trained here", (f"{at}.name",))


def require_saes(study: Study) -> None:
    """Refuse a study without any SAE, for the verbs that need one.

    Args:
        study: The study.

    Raises:
        StudyError: Neither `saes` nor `external_saes` is given.
    """
    if study.saes is None and not study.external_saes:
        raise StudyError(
            f"{study.name}: neither saes nor external_saes is given, so there is no SAE to evaluate",
            "add a section saes to train some, or external_saes to evaluate others",
        )


def number_fields(study: Study) -> dict[str, Any]:
    """Everything that changes numbers, as JSON values.

    Left out: `name`, `tracking`, `compute`, `report`, and names, paths and revisions of models and data, for which
    fingerprints stand.
    """
    return study.model_dump(
        mode="json",
        exclude={
            "name": True,
            "tracking": True,
            "compute": True,
            "report": True,
            "pair": {"base", "chat", "base_revision", "chat_revision"},
            "tokens": {"dataset", "revision"},
            "instruct": {"dataset", "rollouts"},
            "external_saes": {"__all__": {"path", "accept_mismatch"}},
        },
    )


def study_hash(study: Study, fingerprints: dict[str, str]) -> str:
    """Identify what a study's numbers depend on, the same in every process and on every machine.

    Args:
        study: The study.
        fingerprints: Of what the study names by path or id: models, tokens, external SAEs.

    Returns:
        Sha256 (hex) of the canonical JSON of `number_fields` and the fingerprints.
    """
    value = {"study": number_fields(study), "fingerprints": fingerprints}
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a study file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Study.model_json_schema()}
