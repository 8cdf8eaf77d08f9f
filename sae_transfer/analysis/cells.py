"""Every SAE on one model over one token set, as per-sequence sums.

Symbols are METHOD's: x' = c_m x scaled activations, x^' = their reconstruction, mu their mean, T the outlier threshold.
Axes: batch pos d_model d_sae d_vocab; `tok` counts the positions with a loss, `seq` the evaluation sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae_transfer.analysis.metrics import SUMS
from sae_transfer.analysis.site import SiteActivations
from sae_transfer.models.losses import next_token_losses
from sae_transfer.models.splice import Splicer
from sae_transfer.saes.store import StoredSAE

ScalePolicy = Literal["matched", "raw"]
FEATURES_AT_ONCE = 2**26  # values of one slice of [tok d_sae] features: 256 MiB in float32


class CellKey(NamedTuple):
    """Which SAE, under which policies, on the model at hand."""

    sae: str
    scale: ScalePolicy
    outliers: str


@dataclass(frozen=True)
class CellSums:
    """What one cell sums to.

    Attributes:
        sums: `SUMS` -> `[seq]`.
        alive: Features active on at least one counted position of a group, `[group d_sae]`; the groups are those that
            share a mu: one of all sequences, or the batches under `averaging: batch`.
    """

    sums: dict[str, NDArray[np.float64]]
    alive: NDArray[np.bool_]


class Section(NamedTuple):
    """Which positions are spliced and counted, and which of them have a next token whose loss counts; `[seq pos]`."""

    positions: NDArray[np.bool_]
    with_loss: NDArray[np.bool_]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Section":
        """Every position; the last of each sequence has no next token."""
        positions = np.ones(shape, bool)
        with_loss = positions.copy()
        with_loss[:, -1] = False
        return cls(positions, with_loss)


@dataclass
class _Reconstruction:
    """One SAE's reconstruction of a batch, under one factor."""

    acts: Float[Tensor, "batch pos d_model"]
    squared_error: Float[Tensor, "batch pos"]
    l0: Int[Tensor, "batch pos"]
    alive: dict[str, Bool[Tensor, "d_sae"]]


def scale_factor(sae: StoredSAE, norm_scale: float, policy: ScalePolicy) -> float:
    """What the SAE's input is multiplied by: c_m / c_s under `matched`, 1 under `raw` or without a c_s."""
    return 1.0 if policy == "raw" or sae.scale is None else norm_scale / sae.scale


def evaluate_model(
    splicer: Splicer,
    sequences: NDArray[np.integer],
    site: SiteActivations,
    section: Section,
    saes: Sequence[StoredSAE],
    *,
    norm_scale: float,
    counted: Mapping[str, NDArray[np.bool_]],
    scale_policies: Sequence[ScalePolicy],
    group_size: int,
    batch_size: int,
    device: str,
    progress: Callable[[int], None],
) -> dict[CellKey, CellSums]:
    """Sums of every cell of one model.

    A batch runs on from the site once untouched and once for each distinct spliced residual; an SAE's reconstruction is
    made once for all policies under which it is the same.

    Args:
        splicer: The model cut at the site.
        sequences: Token ids `[seq pos]`.
        site: The model's activations over them.
        section: Which positions count.
        saes: To be evaluated.
        norm_scale: c_m.
        counted: Outlier policy -> the positions of the section that are spliced and counted under it, `[seq pos]`.
        scale_policies: Of `matched`, `raw`.
        group_size: Sequences that share one mu: all, or those of a batch under `averaging: batch`; a multiple of
            `batch_size`.
        batch_size: Sequences a pass.
        device: Where model and SAEs are.
        progress: Told the number of sequences done.

    Returns:
        Key -> sums.
    """
    n_sequences = len(sequences)
    means = {p: _group_means(site.acts, positions, norm_scale, group_size) for p, positions in counted.items()}
    is_constant_ablation = splicer.is_residual and bool(section.positions.all())
    keys = [CellKey(sae.name, s, o) for sae in saes for s in scale_policies for o in counted]
    sums = {key: {name: np.zeros(n_sequences) for name in SUMS} for key in keys}
    n_groups = -(-n_sequences // group_size)
    alive = {key: np.zeros((n_groups, sae.d_sae), bool) for sae in saes for key in keys if key.sae == sae.name}

    for start in range(0, n_sequences, batch_size):
        rows = slice(start, min(start + batch_size, n_sequences))
        tokens = torch.from_numpy(sequences[rows].astype(np.int64)).to(device)
        acts = torch.from_numpy(site.acts[rows]).to(device)
        inside = torch.from_numpy(section.positions[rows]).to(device)
        has_loss = torch.from_numpy(section.with_loss[rows]).to(device)
        masks = {p: torch.from_numpy(positions[rows]).to(device) for p, positions in counted.items()}
        mu = {p: torch.from_numpy(mean[start // group_size]).to(device) for p, mean in means.items()}  # of x'

        reconstructions: dict[tuple[str, float], _Reconstruction] = {}
        for sae in saes:
            for factor in {scale_factor(sae, norm_scale, policy) for policy in scale_policies}:
                reconstructions[sae.name, factor] = _reconstruct(sae, acts, factor, norm_scale, masks)
        cell_of = {
            key: (key.sae, scale_factor(sae, norm_scale, key.scale))
            for sae in saes
            for key in keys
            if key.sae == sae.name
        }

        # What stands at the site in each pass; passes that would be equal share one entry.
        residuals: dict[object, Tensor] = {"clean": acts}
        pass_of: dict[object, object] = {}
        for key in keys:
            mask = masks[key.outliers]
            pass_of[key] = (*cell_of[key], "all" if bool((mask == inside).all()) else key.outliers)
            if pass_of[key] not in residuals:
                residuals[pass_of[key]] = torch.where(mask[..., None], reconstructions[cell_of[key]].acts, acts)
        constants = {
            "zero": torch.zeros_like(acts[0, 0]),
            **{("mean", p): mu[p] / norm_scale for p in counted},
        }
        if not is_constant_ablation:
            residuals |= {name: torch.where(inside[..., None], value, acts) for name, value in constants.items()}

        targets = tokens.roll(-1, 1)[has_loss]
        hidden = {name: splicer.run_on(tokens, residual)[has_loss] for name, residual in residuals.items()}
        names = [name for name in hidden if name != "clean"]
        ce_clean, spliced = next_token_losses(splicer.head, targets, hidden["clean"], [hidden[n] for n in names])
        losses = dict(zip(names, spliced, strict=True))
        ce_constant = (
            {name: _constant_ce(splicer, tokens, value, targets) for name, value in constants.items()}
            if is_constant_ablation
            else {name: losses[name].ce for name in constants}
        )

        of_row = torch.nonzero(has_loss)[:, 0]

        def per_sequence(values: Float[Tensor, "tok"], of_row: Tensor = of_row, n: int = len(tokens)) -> NDArray:
            total = torch.zeros(n, dtype=torch.float64, device=values.device)
            return total.index_add_(0, of_row, values.double()).cpu().numpy()

        shared = {"n_loss_tokens": has_loss.sum(1).cpu().numpy(), "ce_clean": per_sequence(ce_clean)}
        shared["ce_zero"] = per_sequence(ce_constant["zero"])
        for policy, mask in masks.items():
            variance = (acts * norm_scale - mu[policy]).square().sum(-1, dtype=torch.float64)
            of_policy = {
                **shared,
                "n_tokens": mask.sum(1).cpu().numpy(),
                "ce_mean": per_sequence(ce_constant["mean", policy]),
                "variance": _masked(variance, mask),
            }
            for key in (key for key in keys if key.outliers == policy):
                reconstruction, loss = reconstructions[cell_of[key]], losses[pass_of[key]]
                of_cell = {
                    **of_policy,
                    "l0": _masked(reconstruction.l0, mask),
                    "squared_error": _masked(reconstruction.squared_error, mask),
                    "explained_per_token": _masked(1 - reconstruction.squared_error / variance, mask),
                    "ce_sae": per_sequence(loss.ce),
                    "kl": per_sequence(loss.kl),
                    "top1_agreement": per_sequence(loss.agrees),
                }
                for name, values in of_cell.items():
                    sums[key][name][rows] = values
                alive[key][start // group_size] |= reconstruction.alive[policy].cpu().numpy()
        progress(rows.stop)
    return {key: CellSums(sums[key], alive[key]) for key in keys}


def _masked(values: Tensor, mask: Bool[Tensor, "batch pos"]) -> NDArray[np.float64]:
    """Sum over the masked positions of each sequence, float64 `[batch]`."""
    return torch.where(mask, values.double(), 0.0).sum(1).cpu().numpy()


@torch.inference_mode()
def _reconstruct(
    sae: StoredSAE,
    acts: Float[Tensor, "batch pos d_model"],
    factor: float,
    norm_scale: float,
    masks: Mapping[str, Bool[Tensor, "batch pos"]],
) -> _Reconstruction:
    flat = acts.flatten(0, 1)
    decoded = torch.empty_like(flat)
    l0 = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    alive = {policy: torch.zeros(sae.d_sae, dtype=torch.bool, device=flat.device) for policy in masks}
    step = max(1, FEATURES_AT_ONCE // sae.d_sae)
    for start in range(0, len(flat), step):
        at = slice(start, start + step)
        features, decoded[at] = sae.reconstruct(flat[at], factor)
        active = features > 0
        l0[at] = active.sum(-1)
        for policy, mask in masks.items():
            alive[policy] |= active[mask.flatten()[at]].any(0)
    error = ((flat - decoded) * norm_scale).square().sum(-1, dtype=torch.float64)
    shape = acts.shape[:2]
    return _Reconstruction(decoded.view_as(acts), error.view(shape), l0.view(shape), alive)


def _group_means(
    acts: NDArray[np.float32], counted: NDArray[np.bool_], norm_scale: float, group_size: int
) -> NDArray[np.float32]:
    """Mu of each group of sequences, `[group d_model]`: the mean of x' over its counted positions."""
    means = []
    for start in range(0, len(acts), group_size):
        total = np.zeros(acts.shape[-1])
        for row in range(start, min(start + group_size, len(acts))):
            total += acts[row][counted[row]].sum(0, dtype=np.float64)
        means.append(total * norm_scale / max(1, counted[start : start + group_size].sum()))
    return np.stack(means).astype(np.float32)


def _constant_ce(
    splicer: Splicer,
    tokens: Int[Tensor, "batch pos"],
    value: Float[Tensor, "d_model"],
    targets: Int[Tensor, "tok"],
) -> Float[Tensor, "tok"]:
    """Cross-entropy when every position of a residual-stream site holds one vector.

    Attention then averages equal values and nothing else mixes positions: all logits are equal, and one sequence tells.
    Its positions are averaged in float64, since an error of rounding would be the same for every target.
    """
    row = tokens[:1]
    hidden = splicer.run_on(row, value.expand(*row.shape, -1))[0]
    return -splicer.head.logits(hidden).double().log_softmax(-1).mean(0)[targets]
