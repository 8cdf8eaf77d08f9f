"""Loss and gradients of one batch for standard, topk and batchtopk SAEs: SAELens's losses, without its autograd.

Where few features are active their gradients come from sparse products, where many from dense ones; both are exact.
For a standard SAE that is decided block by block, from the number of active features just counted in it. So the choice
is a function of weights and batch alone: nothing of it needs to be in a checkpoint, a resumed training chooses as the
uncut one did, and as a change of ways costs nothing there is no need to hold on to one (no hysteresis).

Not compiled: nine tenths of a dense step are matrix products, and torch.compile gained nothing on a CPU (torch 2.13).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from sae_transfer.saes.gradients import ActiveFeatures, Gradients, blocks

# The share of active features up to which sparse products are taken. CPU: measured with one thread, d_model 128 to 896
# and d_sae 1024 to 8192, both ways cost the same at 0.06 to 0.07 on a Xeon and at 0.07 to 0.1 on an EPYC. CUDA: not
# measured. By bytes and FLOPs of an H200 the break-even is near 0.0045 against bfloat16; this leaves the sparse
# products room to be four times off their bound, and takes in an L0 of 131 at the post's width of 131072.
SPARSE_BELOW = {"cpu": 0.07, "cuda": 0.001}
# The same for topk and batchtopk. CUDA: not measured either; the break-even itself, since their other way is SAELens's
# autograd, which moves four times the bytes of a dense bfloat16 step by hand. That is the room for sparse products.
TOP_K_BELOW = {**SPARSE_BELOW, "cuda": 0.0045}


class Outcome(NamedTuple):
    """What is known of a batch once its gradients are in place.

    Attributes:
        sae_out: Reconstruction.
        losses: Mean over the batch, by SAELens's names; the loss is their sum.
        counts: On how many rows each feature was active.
    """

    sae_out: Float[Tensor, "batch d_model"]
    losses: dict[str, Float[Tensor, ""]]
    counts: Float[Tensor, "d_sae"]


def by_hand(sae: TrainingSAE[Any], device: torch.device) -> bool:
    """Whether this SAE has a step here; gated, jumprelu and topk with many active features have SAELens's."""
    if sae.cfg.normalize_activations != "none" or sae.dtype != torch.float32:
        return False
    if type(sae) is StandardTrainingSAE:
        return sae.cfg.lp_norm == 1
    if type(sae) in (TopKTrainingSAE, BatchTopKTrainingSAE):
        return sae.cfg.k <= TOP_K_BELOW[device.type] * sae.cfg.d_sae
    return False


@torch.no_grad()
def standard_step(
    sae: StandardTrainingSAE, x: Float[Tensor, "batch d_model"], l1: float, dtype: torch.dtype
) -> Outcome:
    """Squared error + l1 * sum of activations times decoder norms; gradients into `grad`.

    Args:
        sae: Float32.
        x: Float32.
        l1: The penalty's coefficient at this step.
        dtype: Of dense products.
    """
    norms = sae.W_dec.norm(dim=1)
    share = l1 / len(x)
    gradients = Gradients(sae, x, share * norms, dtype)
    for block in blocks(len(x), sae.cfg.d_sae, x.device):
        acts = gradients.pre_acts(block).relu_()
        active = _few_active(acts)
        if active is None:
            gradients.add_dense(block, acts)
        else:
            gradients.add_sparse(block, active)
        del acts, active  # a GPU's block is of gigabytes
    gradients.finish()
    # the norms in the penalty have a gradient too: the row's direction, and none at zero
    by_norm = torch.where(norms > 0, gradients.act_sums / norms, 0.0)
    assert sae.W_dec.grad is not None
    sae.W_dec.grad.addcmul_(sae.W_dec, by_norm[:, None], value=share)
    losses = {"mse_loss": gradients.squared_error(), "l1_loss": share * (gradients.act_sums @ norms)}
    return Outcome(gradients.sae_out, losses, gradients.counts)


@torch.no_grad()
def topk_step(
    sae: TopKTrainingSAE,
    x: Float[Tensor, "batch d_model"],
    is_dead: Bool[Tensor, "d_sae"],
    dtype: torch.dtype,
) -> Outcome:
    """Squared error + SAELens's auxiliary loss of dead features, for topk and batchtopk; gradients into `grad`.

    When activations are rescaled by decoder norms, the norms cancel between encoder and decoder: they decide which
    features are active, and have no gradient.

    Args:
        sae: Float32. The moving threshold of a batchtopk SAE is updated.
        x: Float32.
        is_dead: Features of the auxiliary loss.
        dtype: Of dense products.
    """
    norms = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else None
    gradients = Gradients(sae, x, x.new_zeros(sae.cfg.d_sae), dtype)
    dead = is_dead.nonzero().squeeze(1)
    dead_pre_acts = x.new_empty(len(x), len(dead))
    whole = isinstance(sae, BatchTopKTrainingSAE)  # its choice is one of the whole batch
    for block in [slice(0, len(x))] if whole else blocks(len(x), sae.cfg.d_sae, x.device):
        ranked = gradients.pre_acts(block).float()
        if norms is not None:
            ranked *= norms
        dead_pre_acts[block] = ranked[:, dead]
        active = _batch_top(ranked, sae.cfg.k) if whole else _row_top(ranked, int(sae.cfg.k))
        if isinstance(sae, BatchTopKTrainingSAE):
            sae.update_topk_threshold(active.values)
        if norms is not None:
            active = active._replace(values=active.values * (1 / norms)[active.cols])
        gradients.add_sparse(block, active)
        del ranked, active
    gradients.finish()
    losses = {"mse_loss": gradients.squared_error(), "auxiliary_reconstruction_loss": x.new_zeros(())}
    if len(dead):
        losses["auxiliary_reconstruction_loss"] = _revive(sae, gradients, x, dead, dead_pre_acts, norms)
    return Outcome(gradients.sae_out, losses, gradients.counts)


def _revive(
    sae: TopKTrainingSAE,
    gradients: Gradients,
    x: Float[Tensor, "batch d_model"],
    dead: Tensor,
    pre_acts: Float[Tensor, "batch dead"],
    norms: Float[Tensor, "d_sae"] | None,
) -> Float[Tensor, ""]:
    """The auxiliary loss: the strongest dead features of a token reconstruct what its reconstruction left out.

    As in SAELens: d_model / 2 of them, weighted down when fewer are dead; the residual is no path for gradients.
    """
    half = x.shape[1] // 2
    n_aux, weight = min(half, len(dead)), min(len(dead) / half, 1.0) * sae.cfg.aux_loss_coefficient
    chosen = pre_acts.topk(n_aux, sorted=False).indices
    is_chosen = torch.zeros_like(pre_acts).scatter_(1, chosen, 1.0)
    acts = pre_acts * is_chosen if norms is None else pre_acts / norms[dead] * is_chosen
    W_dec = sae.W_dec[dead]
    error = acts @ W_dec - gradients.residual(slice(None))
    grad = error * (2 * weight / len(x))
    gradients.add_features(dead, acts.T @ grad, (grad @ W_dec.T).mul_(is_chosen))
    return weight * error.square().sum() / len(x)


def _few_active(acts: Float[Tensor, "tok d_sae"]) -> ActiveFeatures | None:
    """The positive ones of activations that are none of them negative; None where sparse products would not pay."""
    limit = SPARSE_BELOW[acts.device.type] * acts.numel()
    is_active = acts.bool()  # `acts > 0` takes five times as long on a CPU (torch 2.13)
    if acts.device.type == "cpu":
        # torch takes a hundred times as long to count, and twice as long to find (2.13)
        array = is_active.numpy()
        flat = torch.from_numpy(np.flatnonzero(array)) if np.count_nonzero(array) <= limit else None
    else:
        flat = is_active.view(-1).nonzero().squeeze(1) if int(is_active.sum()) <= limit else None
    return None if flat is None else _at(flat, acts.view(-1)[flat].float(), acts.shape[1])


def _row_top(ranked: Float[Tensor, "tok d_sae"], k: int) -> ActiveFeatures:
    """The k largest of each row, of these the positive ones."""
    values, cols = torch.topk(ranked, k, dim=-1, sorted=False)
    is_active = values > 0
    return ActiveFeatures(is_active.nonzero()[:, 0].int(), cols[is_active].int(), values[is_active])


def _batch_top(ranked: Float[Tensor, "tok d_sae"], k: float) -> ActiveFeatures:
    """The largest of all rows together, k a row on average, of these the positive ones."""
    values, flat = torch.topk(ranked.view(-1), int(k * len(ranked)), sorted=False)
    flat, order = flat[values > 0].sort()
    return _at(flat, values[values > 0][order], ranked.shape[1])


def _at(flat: Tensor, values: Tensor, d_sae: int) -> ActiveFeatures:
    return ActiveFeatures((flat // d_sae).int(), (flat % d_sae).int(), values)
