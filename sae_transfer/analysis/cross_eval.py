"""The stage: every SAE on every model over one token set."""

import gc
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_transfer.analysis.cells import OutlierPolicy, ScalePolicy, Section, evaluate_model, is_outlier
from sae_transfer.analysis.metrics import Averaging
from sae_transfer.analysis.norms import SiteActivations, collect_activations, propose_threshold
from sae_transfer.analysis.rows import Cell, CellLabel, write_rows
from sae_transfer.models.pair import Checkpoint, load_model
from sae_transfer.models.splice import Splicer, open_splicer
from sae_transfer.models.tokens import TokenSet
from sae_transfer.progress import Meter
from sae_transfer.saes.store import StoredSAE

logger = logging.getLogger(__name__)


def cross_evaluate(
    directory: Path,
    checkpoints: Mapping[str, Checkpoint],
    token_set: TokenSet,
    load_saes: Callable[[Mapping[str, float]], Sequence[StoredSAE]],
    *,
    hook_name: str,
    norm_scales: Mapping[str, float] | None,
    outlier_threshold: float | str,
    outlier_policies: Sequence[OutlierPolicy],
    scale_policies: Sequence[ScalePolicy],
    averaging: Averaging,
    batch_size: int,
    dtype: str,
    device: str,
) -> dict[str, float]:
    """Evaluate and write rows.csv, transfer.csv and sums.npz.

    Args:
        directory: `cross_eval/` of the run; activations lie there while it works, 4 bytes a value.
        checkpoints: `base` and `chat`.
        token_set: Its evaluation sequences are used.
        load_saes: Given c_m of each model, the SAEs; called once the models have been seen to be sound.
        hook_name: The site.
        norm_scales: c_m of each model; None measures them on the evaluation tokens.
        outlier_threshold: T, or `auto`.
        outlier_policies: Of `excluded`, `kept`; only `excluded` needs a T.
        scale_policies: Of `matched`, `raw`.
        averaging: `pooled` or `batch`.
        batch_size: Sequences a batch.
        dtype: Of the models; SAEs and metrics are float32 and float64.
        device: A torch device.

    Returns:
        c_m of each model, as given or measured.

    Raises:
        StudyError: Something does not fit, or `auto` finds no threshold.
    """
    sequences = token_set.evaluation
    directory.mkdir(parents=True, exist_ok=True)
    models = _OneModelAtATime(checkpoints, hook_name, dtype, device)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".activations.") as scratch:
        sites: dict[str, SiteActivations] = {}
        for side, checkpoint in checkpoints.items():
            splicer = models.splicer(side)
            meter = Meter(f"activations of {side}", len(sequences), "sequences")
            sites[side] = collect_activations(
                splicer,
                sequences,
                d_model=checkpoint.d_model,
                batch_size=batch_size,
                device=device,
                path=Path(scratch) / f"{side}.npy",
                progress=meter.update,
            )
        scales = dict(norm_scales or {side: site.norm_scale for side, site in sites.items()})
        threshold = _threshold(outlier_threshold, outlier_policies, sites, scales)
        saes = load_saes(scales)
        cells: list[Cell] = []
        for side in reversed(list(checkpoints)):  # the last one is still loaded
            splicer = models.splicer(side)
            outliers = is_outlier(sites[side].norms, scales[side], threshold)
            meter = Meter(f"cross-evaluation on {side}", len(sequences), "sequences")
            sums = evaluate_model(
                splicer,
                sequences,
                sites[side],
                Section.whole(sequences.shape),
                saes,
                norm_scale=scales[side],
                outliers=outliers,
                scale_policies=scale_policies,
                outlier_policies=outlier_policies,
                group_size=batch_size if averaging == "batch" else len(sequences),
                batch_size=batch_size,
                device=device,
                progress=meter.update,
            )
            by_name = {sae.name: sae for sae in saes}
            for key, result in sums.items():
                sae = by_name[key.sae]
                label = CellLabel(
                    section="pile",
                    sae=sae.name,
                    sae_trained_on=sae.trained_on,
                    architecture=sae.architecture,
                    d_sae=sae.d_sae,
                    sparsity_key=sae.sparsity_key,
                    sparsity_value=sae.sparsity_value,
                    seed=sae.seed,
                    model=side,
                    hook_name=hook_name,
                    dtype=dtype,
                    scale=key.scale,
                    norm_scale=scales[side],
                    sae_scale=sae.scale,
                    outliers=key.outliers,
                    outlier_threshold=threshold,
                    averaging=averaging,
                )
                cells.append(Cell(label, result, int(outliers.sum())))
    order = {side: i for i, side in enumerate(checkpoints)}
    cells.sort(key=lambda cell: order[cell.label.model])  # a stable sort: SAEs and policies keep the file's order
    write_rows(directory, cells, averaging, batch_size)
    return scales


def _threshold(
    asked: float | str,
    outlier_policies: Sequence[OutlierPolicy],
    sites: Mapping[str, SiteActivations],
    scales: Mapping[str, float],
) -> float | None:
    if not isinstance(asked, str):
        return asked
    if "excluded" not in outlier_policies:
        return None
    threshold = propose_threshold([site.norms * scales[side] for side, site in sites.items()])
    logger.info("outlier threshold: %s, in the lowest wide gap of the scaled norms of both models", threshold)
    return threshold


class _OneModelAtATime:
    """Splicers of the two models, of which one is in memory."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], hook_name: str, dtype: str, device: str) -> None:
        self._checkpoints, self._hook_name, self._dtype, self._device = checkpoints, hook_name, dtype, device
        self._side: str | None = None
        self._splicer: Splicer | None = None

    def splicer(self, side: str) -> Splicer:
        if self._splicer is None or self._side != side:
            self._splicer = None  # the old model's memory before the new one's
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            checkpoint = self._checkpoints[side]
            model: Any = load_model(checkpoint, dtype=self._dtype, device=self._device)
            self._splicer, self._side = open_splicer(model, self._hook_name, checkpoint), side
        return self._splicer
