"""The stage: how far apart the two models' weights are, and their activations at the site on the same tokens."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sae_transfer import signals
from sae_transfer.errors import StudyError
from sae_transfer.models.pair import Checkpoint
from sae_transfer.progress import Meter
from sae_transfer.study import write_json, write_text

logger = logging.getLogger(__name__)

# Values of one side taken at a time, at least one row: as float64 they stay in the CPU's cache, which is three times
# faster than 8 MiB at a time, and memory does not grow with the checkpoint.
CHUNK_VALUES = 2**17
# What stands in front of every name depends on the class and on how it was saved: GPT-2's hub files have nothing.
PREFIX = re.compile(r"^(model|transformer|gpt_neox)\.")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
# Constants that old versions of transformers saved among the weights.
BUFFER = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.")
# The module's name (first that fits) -> what its weight is; several kinds where projections are fused into one tensor.
KINDS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(pattern), tuple(kinds.split()))
    for pattern, kinds in (
        (r"norm|(^|\.)ln_\w+$", "norm"),
        (r"(^|\.)(embed_tokens|embed_in|wte)$", "embedding"),
        (r"(^|\.)(embed_positions|wpe)$", "position_embedding"),
        (r"(^|\.)(lm_head|embed_out)$", "unembedding"),
        (r"attn\.q_proj$", "q"),
        (r"attn\.k_proj$", "k"),
        (r"attn\.v_proj$", "v"),
        (r"(attention\.query_key_value|attn\.c_attn|attn\.qkv_proj)$", "q k v"),
        (r"(attn|attention)\.(o_proj|c_proj|dense|out_proj)$", "o"),
        (r"mlp\.gate_proj$", "mlp_gate"),
        (r"mlp\.gate_up_proj$", "mlp_gate mlp_in"),
        (r"mlp\.(up_proj|dense_h_to_4h|c_fc|fc1)$", "mlp_in"),
        (r"mlp\.(down_proj|dense_4h_to_h|c_proj|fc2)$", "mlp_out"),
    )
)
BY_TOKEN = ("embedding", "unembedding", "unembedding_bias")


@dataclass(frozen=True)
class Spread:
    """A quantity over positions: mean, median, 5th and 95th percentile."""

    mean: float
    median: float
    p5: float
    p95: float


@dataclass(frozen=True)
class ActivationDifference:
    """How the two models' activations differ at the positions counted, each position against itself.

    Attributes:
        n_positions: How many are counted.
        cosine: x_base . x_chat / (||x_base|| ||x_chat||); the same raw and scaled.
        relative_distance: ||x_chat - x_base|| / ||x_base||, raw activations.
        relative_distance_scaled: The same of scaled activations c_m x, each model by its own factor.
    """

    n_positions: int
    cosine: Spread
    relative_distance: Spread
    relative_distance_scaled: Spread


def compare(
    directory: Path,
    checkpoints: Mapping[str, Checkpoint],
    acts: Mapping[str, Float[NDArray[np.float32], "seq pos d_model"]],
    *,
    norm_scales: Mapping[str, float],
    outliers: NDArray[np.bool_],
) -> None:
    """Compare both models and write rows.csv, by_kind.csv and activations.json.

    Args:
        directory: `weights/` of the run.
        checkpoints: `base` and `chat`.
        acts: Of each, raw activations at the site over the same tokens.
        norm_scales: c_m of each.
        outliers: `[seq pos]`, true where the position is an outlier in either model.

    Raises:
        StudyError: A checkpoint is damaged, or the two have weights of different shapes.
    """
    meter: Meter | None = None

    def progress(done: int, total: int) -> None:
        nonlocal meter
        meter = meter or Meter("weights", total, "parameters")
        meter.update(done)

    rows = compare_weights(checkpoints["base"], checkpoints["chat"], progress=progress)
    activations = compare_activations(acts["base"], acts["chat"], norm_scales=norm_scales, outliers=outliers)
    write_text(directory / "rows.csv", rows.to_csv(index=False))
    write_text(directory / "by_kind.csv", by_kind(rows).to_csv(index=False))
    write_json(directory / "activations.json", {policy: asdict(found) for policy, found in activations.items()})


def compare_weights(base: Checkpoint, chat: Checkpoint, *, progress: Callable[[int, int], None]) -> pd.DataFrame:
    """Norms, relative difference ||W_chat - W_base|| / ||W_base|| and cosine of every weight, sums in float64.

    Streamed from the files in chunks: memory does not grow with the checkpoint. Fused projections are taken apart. A
    tied unembedding has no row; of one that is tied on one side only, that side's embedding is taken. Embeddings are
    compared over the token ids that both sides have. Weights are compared as they are stored (Gemma's norms store the
    offset from 1); what only one side has is named in a warning.

    Args:
        base: The base side.
        chat: The chat side.
        progress: Told the number of parameters compared, and how many there are.

    Returns:
        A row a (weight, kind): name (without the class's prefix), layer (empty outside the layers), kind (`q`, `k`,
        `v`, `o`, `mlp_in`, `mlp_gate`, `mlp_out`, `norm`, `embedding`, `position_embedding`, `unembedding`, each with
        `_bias` for its bias vector; `other`), n_parameters, norm_base, norm_chat, norm_difference,
        relative_difference, cosine. The last two are empty where a norm is zero.

    Raises:
        StudyError: A file is damaged or absent, or a weight has another shape on the other side.
    """
    with ExitStack() as stack:
        ours, theirs = (_weights_of(checkpoint, stack) for checkpoint in (base, chat))
        _untie(ours, theirs)
        if unmatched := sorted(ours.keys() ^ theirs.keys()):
            logger.warning("weights: in one model's files only, not compared: %s", ", ".join(unmatched))
        names = sorted(ours.keys() & theirs.keys(), key=_in_order)
        total, done, rows = sum(int(np.prod(ours[name].shape)) for name in names), 0, []
        for name in names:
            rows += _compare_one(name, ours[name], theirs[name], base.config)
            done += int(np.prod(ours[name].shape))
            progress(done, total)
            signals.check()
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Pool the rows of each layer and kind: norms are roots of summed squares, ratios are taken last.

    Args:
        rows: As `compare_weights` gives them.

    Returns:
        A row a (layer, kind), with the same columns but for the name.
    """
    sums: defaultdict[tuple[Any, str], NDArray[np.float64]] = defaultdict(lambda: np.zeros(5))
    for row in rows.to_dict("records"):
        base, chat, difference = row["norm_base"], row["norm_chat"], row["norm_difference"]
        dot = row["cosine"] * base * chat if base and chat else 0.0
        sums[row["layer"], row["kind"]] += (row["n_parameters"], base**2, chat**2, difference**2, dot)
    pooled = [
        {"layer": layer, "kind": kind, **_measures(int(n), *squares)} for (layer, kind), (n, *squares) in sums.items()
    ]
    return pd.DataFrame(pooled).astype({"layer": "Int64"})


def compare_activations(
    base_acts: Float[NDArray[np.float32], "seq pos d_model"],
    chat_acts: Float[NDArray[np.float32], "seq pos d_model"],
    *,
    norm_scales: Mapping[str, float],
    outliers: NDArray[np.bool_],
) -> dict[str, ActivationDifference]:
    """Cosine and relative distance of the two models' activations, position by position, on the same tokens.

    Args:
        base_acts: Raw activations of the base model, possibly memory-mapped; read in chunks, sums in float64.
        chat_acts: Of the chat model.
        norm_scales: c_m of `base` and `chat`.
        outliers: `[seq pos]`, true where the position is an outlier in either model.

    Returns:
        `kept`: over all positions; `excluded`: without the outliers, absent when nothing would be left. Positions
        where an activation is exactly zero are never counted.
    """
    n_seq, n_pos, d_model = base_acts.shape
    cosine, raw, scaled = (np.full((n_seq, n_pos), np.nan) for _ in range(3))
    step = max(1, CHUNK_VALUES // (n_pos * d_model))
    for chunk in (slice(start, start + step) for start in range(0, n_seq, step)):
        signals.check()
        x, y = (np.asarray(acts[chunk], dtype=np.float64) for acts in (base_acts, chat_acts))
        norm_x, norm_y = (np.linalg.norm(a, axis=-1) for a in (x, y))
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine[chunk] = np.einsum("spd,spd->sp", x, y) / (norm_x * norm_y)
            raw[chunk] = np.linalg.norm(y - x, axis=-1) / norm_x
            distance = np.linalg.norm(norm_scales["chat"] * y - norm_scales["base"] * x, axis=-1)
            scaled[chunk] = distance / (norm_scales["base"] * norm_x)
    defined = np.isfinite(cosine)
    return {
        policy: ActivationDifference(
            int(counted.sum()), *(_spread(values[counted]) for values in (cosine, raw, scaled))
        )
        for policy, counted in (("kept", defined), ("excluded", defined & ~outliers))
        if counted.any()
    }


def _spread(values: NDArray[np.float64]) -> Spread:
    median, p5, p95 = np.quantile(values, (0.5, 0.05, 0.95))
    return Spread(float(values.mean()), float(median), float(p5), float(p95))


@dataclass(frozen=True)
class _Weight:
    """One tensor in an open safetensors file."""

    file: Any
    name: str
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def rows(self, n_rows: int, step: int) -> Iterator[Float[torch.Tensor, "rows columns"]]:
        """The first `n_rows` along the first axis in chunks of `step`, float64; other axes are flattened."""
        stored = self.file.get_slice(self.name)
        for start in range(0, n_rows, step):
            chunk = stored[start : min(start + step, n_rows)]
            yield chunk.double().reshape(chunk.shape[0], -1)


def _weights_of(checkpoint: Checkpoint, stack: ExitStack) -> dict[str, _Weight]:
    """Names without the class's prefix -> tensors, in the files that transformers would read."""
    directory = checkpoint.directory
    try:
        files = ["model.safetensors"]
        if not (directory / files[0]).is_file():
            index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        found = {}
        for name in files:
            file = stack.enter_context(safe_open(directory / name, framework="pt"))
            found |= {PREFIX.sub("", key): _Weight(file, key, checkpoint.source) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(checkpoint.source, error) from error
    weights = {name: weight for name, weight in found.items() if not BUFFER.search(name)}
    unembedding = _find(weights, "unembedding")
    if unembedding and checkpoint.config.get("tie_word_embeddings"):
        del weights[unembedding]  # a copy that was saved all the same, and is not read when the model is loaded
    return weights


def _untie(ours: dict[str, _Weight], theirs: dict[str, _Weight]) -> None:
    """Where one side alone has an unembedding, give the other its embedding as one, which it is."""
    for here, there in ((ours, theirs), (theirs, ours)):
        unembedding, embedding = _find(here, "unembedding"), _find(there, "embedding")
        if unembedding and embedding and not _find(there, "unembedding"):
            there[unembedding] = there[embedding]


def _find(weights: Mapping[str, _Weight], kind: str) -> str | None:
    return next((name for name in weights if _kinds(name) == (kind,)), None)


def _kinds(name: str) -> tuple[str, ...]:
    """What a tensor holds, by its name; a bias vector is named after its weight."""
    module, _, parameter = name.rpartition(".")
    kinds = next((kinds for pattern, kinds in KINDS if pattern.search(module)), ("other",))
    return tuple(f"{kind}_bias" for kind in kinds) if parameter == "bias" else kinds


def _layer(name: str) -> int | None:
    match = LAYER.search(name)
    return int(match[1]) if match else None


def _in_order(name: str) -> tuple[int, float, str]:
    """As the residual stream meets them: embeddings, layers by number, what comes after."""
    layer = _layer(name)
    if layer is not None:
        return 1, layer, name
    return (0 if any("embedding" in kind and "unembedding" not in kind for kind in _kinds(name)) else 2), 0, name


def _compare_one(name: str, ours: _Weight, theirs: _Weight, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of one tensor: one, or one a projection where several are fused."""
    shape, other = ours.shape, theirs.shape
    if _kinds(name)[0] in BY_TOKEN:
        shape, other = ((min(shape[0], other[0]), *s[1:]) for s in (shape, other))
    if shape != other:
        raise StudyError(
            f"pair: {name} has the shape {list(shape)} in {ours.source} and {list(other)} in {theirs.source}",
            "name a chat model that was fine-tuned from this base model",
        )
    kinds, axis, labels = _parts(name, shape, config)
    n_rows, n_columns = shape[0], int(np.prod(shape[1:]))
    step = max(1, CHUNK_VALUES // n_columns)
    sums = torch.zeros(4, shape[axis], dtype=torch.float64)  # base^2, chat^2, difference^2, base . chat
    start = 0
    for x, y in zip(ours.rows(n_rows, step), theirs.rows(n_rows, step), strict=True):
        place = sums[:, start : start + len(x)] if axis == 0 else sums
        difference = y - x
        for row, (a, b) in zip(place, ((x, x), (y, y), (difference, difference), (x, y)), strict=True):
            row += (a * b).sum(1 - axis)
        start += len(x)
    per_label = n_rows * n_columns // shape[axis]
    return [
        {
            "name": name,
            "layer": _layer(name),
            "kind": kind,
            **_measures(int((labels == part).sum()) * per_label, *sums[:, labels == part].sum(1).tolist()),
        }
        for part, kind in enumerate(kinds)
    ]


def _parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[tuple[str, ...], int, torch.Tensor]:
    """How a tensor is fused: its kinds, the axis along which they lie, and which of them each index of it belongs to.

    GPT-NeoX stacks q, k, v head by head; GPT-2's Conv1D is `[in out]`, with q, k, v side by side; Phi-3 stacks q, k, v
    (of which k and v may be smaller), and gate above up.
    """
    kinds = _kinds(name)
    size = shape[-1] if ".c_attn." in name else shape[0]
    axis = len(shape) - 1 if ".c_attn." in name else 0
    if len(kinds) == 1:
        return kinds, axis, torch.zeros(size, dtype=torch.long)
    n_heads = int(config.get("num_attention_heads") or config["n_head"])
    head_dim = int(config.get("head_dim") or int(config.get("hidden_size") or config["n_embd"]) // n_heads)
    n_kv_heads = int(config.get("num_key_value_heads") or n_heads)
    if ".query_key_value." in name:
        lengths = [head_dim] * 3 * n_heads
    elif ".qkv_proj." in name:
        lengths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
    else:
        lengths = [size // len(kinds)] * len(kinds)
    if sum(lengths) != size:  # a layout of some other class; better unnamed than split wrongly
        return ("other",), axis, torch.zeros(size, dtype=torch.long)
    return kinds, axis, torch.repeat_interleave(torch.arange(len(lengths)) % len(kinds), torch.tensor(lengths))


def _measures(n: int, base: float, chat: float, difference: float, dot: float) -> dict[str, float]:
    """The columns that come from sums: of squares of either side and of their difference, and of products."""
    return {
        "n_parameters": n,
        "norm_base": base**0.5,
        "norm_chat": chat**0.5,
        "norm_difference": difference**0.5,
        "relative_difference": (difference / base) ** 0.5 if base else float("nan"),
        "cosine": dot / (base**0.5 * chat**0.5) if base and chat else float("nan"),
    }


def _damaged(source: str, error: Exception) -> StudyError:
    return StudyError(
        f"{source}: its weights cannot be read ({type(error).__name__}: {error})", "fetch or copy the checkpoint again"
    )
