"""Every SAE on one model over one token set, as per-sequence sums.

A few sequences run on from the site untouched, then with each distinct spliced residual in its place, several of them
in one pass; only what the comparison needs of the clean pass is held, so memory does not grow with the number of SAEs.

Symbols are METHOD's: x' = c_m x scaled activations, x^' = their reconstruction, mu their mean, T the outlier threshold.
Axes: batch pos d_model d_sae d_vocab; `tok` counts the positions with a loss, `seq` the evaluation sequences.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from numpy.typing import NDArray
from torch import Tensor

from sae_transfer.analysis.metrics import SUMS
from sae_transfer.analysis.site import SiteActivations
from sae_transfer.errors import StudyError
from sae_transfer.models.losses import CleanLosses, SplicedLosses, clean_losses, spliced_losses, surprisals
from sae_transfer.models.passes import AtOnce, in_passes
from sae_transfer.models.splice import Splicer
from sae_transfer.saes.store import StoredSAE

ScalePolicy = Literal["matched", "raw"]


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

    The residual is run on from the site once untouched and once for each distinct splice; an SAE's reconstruction is
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
        batch_size: Most sequences a pass; changes no number.
        device: Where model and SAEs are.
        progress: Told the number of sequences done.

    Returns:
        Key -> sums.

    Raises:
        StudyError: Memory runs out, also with half as much at once.
    """
    means = {p: _group_means(site.acts, positions, norm_scale, group_size) for p, positions in counted.items()}
    tally = _Tally(saes, scale_policies, list(counted), len(sequences), group_size)
    constant = _ConstantAblation(splicer) if splicer.is_residual and bool(section.positions.all()) else None

    def run(rows: slice, at_once: AtOnce) -> None:
        batch = _Batch.of(rows, sequences, site, section, counted, means, norm_scale, group_size, device)
        hidden = splicer.run_on(batch.tokens, batch.acts)[batch.has_loss]
        clean = clean_losses(splicer.head, hidden, batch.targets)
        tally.add(tally.keys, batch, ce_clean=batch.per_sequence(clean.ce), n_loss_tokens=batch.has_loss.sum(1))
        for policy, mask in batch.masks.items():
            variance = _masked(batch.variance[policy], mask)
            tally.add(tally.of_policy(policy), batch, n_tokens=mask.sum(1), variance=variance)

        splices = _sae_splices(batch, saes, scale_policies, norm_scale, at_once, tally)
        if constant is None:
            splices = chain(splices, _ablations(batch, norm_scale, tally))
        else:
            constant.add_losses(batch, norm_scale, tally)
        for splice, loss in _run_splices(splicer, batch, clean, splices, at_once.tokens):
            tally.add(splice.cells, batch, **{splice.ce: batch.per_sequence(loss.ce)})
            if splice.ce == "ce_sae":
                kl, agrees = batch.per_sequence(loss.kl), batch.per_sequence(loss.agrees)
                tally.add(splice.cells, batch, kl=kl, top1_agreement=agrees)

    with torch.inference_mode():
        in_passes(run, *sequences.shape, batch_size=batch_size, device=device, progress=progress)
    return tally.cells()


@dataclass(frozen=True)
class _Batch:
    """A few sequences on the device.

    Attributes:
        rows: Which of all.
        group: Which mu they share.
        tokens: Their ids.
        acts: Raw activations at the site.
        inside: The section's positions.
        has_loss: Those with a next token whose loss counts.
        masks: Outlier policy -> positions that are spliced and counted.
        mu: Outlier policy -> mean of x', `[d_model]`.
        variance: Outlier policy -> ||x' - mu||^2, float64.
    """

    rows: slice
    group: int
    tokens: Int[Tensor, "batch pos"]
    acts: Float[Tensor, "batch pos d_model"]
    inside: Bool[Tensor, "batch pos"]
    has_loss: Bool[Tensor, "batch pos"]
    masks: dict[str, Bool[Tensor, "batch pos"]]
    mu: dict[str, Float[Tensor, "d_model"]]
    variance: dict[str, Float[Tensor, "batch pos"]]

    @classmethod
    def of(
        cls,
        rows: slice,
        sequences: NDArray[np.integer],
        site: SiteActivations,
        section: Section,
        counted: Mapping[str, NDArray[np.bool_]],
        means: Mapping[str, NDArray[np.float32]],
        norm_scale: float,
        group_size: int,
        device: str,
    ) -> "_Batch":
        def here(values: NDArray) -> Tensor:
            return torch.from_numpy(values).to(device)

        group = rows.start // group_size
        acts = here(site.acts[rows])
        mu = {policy: here(mean[group]) for policy, mean in means.items()}
        return cls(
            rows,
            group,
            here(sequences[rows].astype(np.int64)),
            acts,
            here(section.positions[rows]),
            here(section.with_loss[rows]),
            {policy: here(positions[rows]) for policy, positions in counted.items()},
            mu,
            {policy: _squared_norm((acts * norm_scale).sub_(mean)) for policy, mean in mu.items()},
        )

    @property
    def targets(self) -> Int[Tensor, "tok"]:
        """Next tokens of the positions with a loss."""
        return self.tokens.roll(-1, 1)[self.has_loss]

    def per_sequence(self, values: Float[Tensor, "tok"]) -> Float[Tensor, "batch"]:
        """Sums of a quantity of the positions with a loss, float64."""
        total = torch.zeros(len(self.tokens), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.has_loss.nonzero()[:, 0], values)


class _Tally:
    """Per-sequence sums and live features of every cell."""

    def __init__(
        self,
        saes: Sequence[StoredSAE],
        scale_policies: Sequence[ScalePolicy],
        outlier_policies: Sequence[str],
        n_sequences: int,
        group_size: int,
    ) -> None:
        d_sae = {sae.name: sae.d_sae for sae in saes}
        self.keys = [CellKey(sae, s, o) for sae in d_sae for s in scale_policies for o in outlier_policies]
        n_groups = -(-n_sequences // group_size)
        self._sums = {key: {name: np.zeros(n_sequences) for name in SUMS} for key in self.keys}
        self._alive = {key: np.zeros((n_groups, d_sae[key.sae]), bool) for key in self.keys}

    def of_policy(self, outliers: str) -> list[CellKey]:
        """The cells under one outlier policy."""
        return [key for key in self.keys if key.outliers == outliers]

    def add(self, keys: Iterable[CellKey], batch: _Batch, **sums: Num[Tensor, "batch"]) -> None:
        """Write down sums of a batch's sequences; a batch that is repeated writes the same again."""
        for name, values in sums.items():
            on_cpu = values.double().cpu().numpy()
            for key in keys:
                self._sums[key][name][batch.rows] = on_cpu

    def add_alive(self, key: CellKey, batch: _Batch, alive: Bool[Tensor, "d_sae"]) -> None:
        """Features that were active on a counted position of the batch."""
        self._alive[key][batch.group] |= alive.cpu().numpy()

    def cells(self) -> dict[CellKey, CellSums]:
        """What came together."""
        return {key: CellSums(self._sums[key], self._alive[key]) for key in self.keys}


class _Splice(NamedTuple):
    """What stands at the site in one pass.

    Attributes:
        cells: Whose loss it gives.
        ce: As which of `SUMS`.
        residual: In place of the activations.
    """

    cells: Sequence[CellKey]
    ce: str
    residual: Float[Tensor, "batch pos d_model"]


def _sae_splices(
    batch: _Batch,
    saes: Sequence[StoredSAE],
    scale_policies: Sequence[ScalePolicy],
    norm_scale: float,
    at_once: AtOnce,
    tally: _Tally,
) -> Iterator[_Splice]:
    """Reconstruct with each SAE, write down how well, and yield each distinct spliced residual."""
    for sae in saes:
        factors = {policy: scale_factor(sae, norm_scale, policy) for policy in scale_policies}
        for factor in dict.fromkeys(factors.values()):
            reconstruction = _reconstruct(sae, batch, factor, at_once)
            error = _squared_norm((batch.acts - reconstruction.acts).mul_(norm_scale))
            cells_of: dict[str, list[CellKey]] = {}  # under policies that splice the same positions there is one pass
            for policy, mask in batch.masks.items():
                keys = [CellKey(sae.name, s, policy) for s in scale_policies if factors[s] == factor]
                cells_of.setdefault("all" if bool((mask == batch.inside).all()) else policy, []).extend(keys)
                tally.add(
                    keys,
                    batch,
                    l0=_masked(reconstruction.l0, mask),
                    squared_error=_masked(error, mask),
                    explained_per_token=_masked(1 - error / batch.variance[policy], mask),
                )
                for key in keys:
                    tally.add_alive(key, batch, reconstruction.alive[policy])
            for keys in cells_of.values():
                mask = batch.masks[keys[0].outliers]
                yield _Splice(keys, "ce_sae", torch.where(mask[..., None], reconstruction.acts, batch.acts))


def _ablations(batch: _Batch, norm_scale: float, tally: _Tally) -> Iterator[_Splice]:
    """Zeros, and each policy's mean, at every position of the section."""
    inside = batch.inside[..., None]
    yield _Splice(tally.keys, "ce_zero", torch.where(inside, 0.0, batch.acts))
    for policy, mu in batch.mu.items():
        yield _Splice(tally.of_policy(policy), "ce_mean", torch.where(inside, mu / norm_scale, batch.acts))


SAME_POSITIONS = 0.02  # of the largest value; bfloat16 rounds by 0.004


class _ConstantAblation:
    """Zeros, or a mean, at every position of a residual-stream site.

    Attention then averages equal values and nothing else mixes positions: all logits are equal, whatever the text, and
    a few positions tell them once for the model (zeros) or once for each mu.
    """

    N_POSITIONS = 16  # averaged, since an error of rounding would be the same for every target

    def __init__(self, splicer: Splicer) -> None:
        self._splicer = splicer
        self._known: dict[str, tuple[int, Tensor]] = {}

    def add_losses(self, batch: _Batch, norm_scale: float, tally: _Tally) -> None:
        """Write down ce_zero and ce_mean."""
        zero = self._surprisals("zero", 0, batch, torch.zeros_like(batch.acts[0, 0]))
        tally.add(tally.keys, batch, ce_zero=batch.per_sequence(zero[batch.targets]))
        for policy, mu in batch.mu.items():
            mean = self._surprisals(f"mean {policy}", batch.group, batch, mu / norm_scale)
            tally.add(tally.of_policy(policy), batch, ce_mean=batch.per_sequence(mean[batch.targets]))

    def _surprisals(
        self, name: str, group: int, batch: _Batch, value: Float[Tensor, "d_model"]
    ) -> Float[Tensor, "d_vocab"]:
        known_group, known = self._known.get(name, (None, None))
        if known is None or known_group != group:
            tokens = batch.tokens[:1, : self.N_POSITIONS]
            hidden = self._splicer.run_on(tokens, value.expand(*tokens.shape, -1))[0].double()
            mean = hidden.mean(0)
            if not (hidden - mean).abs().max() <= SAME_POSITIONS * mean.abs().max():
                raise StudyError(
                    "the model's positions differ where all of them were ablated alike: its attention is no average",
                    "a model of an architecture that the README lists",
                )
            known = surprisals(self._splicer.head, mean)
            self._known[name] = (group, known)
        return known


def _run_splices(
    splicer: Splicer, batch: _Batch, clean: CleanLosses, splices: Iterator[_Splice], tokens_at_once: int
) -> Iterator[tuple[_Splice, SplicedLosses]]:
    """Run the model on from each splice, several in one pass."""
    n_at_once = max(1, tokens_at_once // batch.tokens.numel())
    while group := list(islice(splices, n_at_once)):
        residuals = torch.cat([splice.residual for splice in group])
        hidden = splicer.run_on(batch.tokens.repeat(len(group), 1), residuals)
        for splice, last in zip(group, hidden.chunk(len(group)), strict=True):
            yield splice, spliced_losses(splicer.head, clean, last[batch.has_loss])


class _Reconstruction(NamedTuple):
    """One SAE's reconstruction of a batch, under one factor.

    Attributes:
        acts: In the units of the model's activations; those themselves where no policy counts.
        l0: Active features.
        alive: Outlier policy -> features active on a counted position.
    """

    acts: Float[Tensor, "batch pos d_model"]
    l0: Float[Tensor, "batch pos"]
    alive: dict[str, Bool[Tensor, "d_sae"]]


def _reconstruct(sae: StoredSAE, batch: _Batch, factor: float, at_once: AtOnce) -> _Reconstruction:
    masks = torch.stack([mask.flatten() for mask in batch.masks.values()])
    wanted = masks.any(0).nonzero()[:, 0]
    decoded = batch.acts.flatten(0, 1).clone()
    l0 = torch.zeros(len(decoded), device=decoded.device)
    alive = torch.zeros(len(masks), sae.d_sae, dtype=torch.bool, device=decoded.device)
    for at in wanted.split(at_once.positions(sae.d_sae)):
        features, decoded[at] = sae.reconstruct(decoded[at], factor)
        active = features.gt_(0)  # in place, and as numbers: counting booleans takes ten times as long
        l0[at] = active.sum(-1)
        alive |= masks[:, at].float() @ active > 0
    shape = batch.acts.shape
    return _Reconstruction(decoded.view(shape), l0.view(shape[:2]), dict(zip(batch.masks, alive, strict=True)))


def _squared_norm(values: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
    """Sum of squares over d_model, float64; overwrites."""
    return values.square_().sum(-1, dtype=torch.float64)


def _masked(values: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch"]:
    """Sum over the masked positions of each sequence, float64."""
    return torch.where(mask, values.double(), 0.0).sum(1)


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
