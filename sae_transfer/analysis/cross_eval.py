"""The stage: every SAE on every model over one token set."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sae_transfer.analysis.cells import ScalePolicy, Section, evaluate_model
from sae_transfer.analysis.metrics import Averaging
from sae_transfer.analysis.norms import OutlierPolicy, choose_threshold, counted_positions, is_outlier
from sae_transfer.analysis.rows import Cell, CellLabel, write_rows
from sae_transfer.analysis.site import OneModelAtATime
from sae_transfer.models.tokens import TokenSet
from sae_transfer.progress import Meter
from sae_transfer.saes.store import StoredSAE
from sae_transfer.study import scratch_in

logger = logging.getLogger(__name__)


def cross_evaluate(
    directory: Path,
    models: OneModelAtATime,
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
) -> dict[str, float]:
    """Evaluate and write rows.csv, transfer.csv and sums.npz.

    Args:
        directory: `cross_eval/` of the run; activations lie there while it works, 4 bytes a value.
        models: `base` and `chat`.
        token_set: Its evaluation sequences are used.
        load_saes: Given c_m of each model, the SAEs; called once the models have been seen to be sound.
        hook_name: The site, for the rows.
        norm_scales: c_m of each model; None measures them on the evaluation tokens.
        outlier_threshold: T, or `auto`.
        outlier_policies: Of `excluded`, `kept`; only `excluded` needs a T.
        scale_policies: Of `matched`, `raw`.
        averaging: `pooled` or `batch`.
        batch_size: Sequences a batch.
        dtype: Of the models, for the rows; SAEs and metrics are float32 and float64.

    Returns:
        c_m of each model, as given or measured.

    Raises:
        StudyError: Something does not fit, or `auto` finds no threshold.
    """
    sequences = token_set.evaluation
    with scratch_in(directory) as scratch:
        sites = models.collect(sequences, batch_size, scratch)
        scales = dict(norm_scales or {side: site.norm_scale for side, site in sites.items()})
        scaled_norms = {side: site.norms * scales[side] for side, site in sites.items()}
        threshold = choose_threshold(outlier_threshold, outlier_policies, scaled_norms)
        logger.info("outlier threshold: %s", "none" if threshold is None else threshold)
        saes = load_saes(scales)
        section = Section.whole(sequences.shape)
        by_name = {sae.name: sae for sae in saes}
        cells: list[Cell] = []
        for side in reversed(list(sites)):  # the last one is still loaded
            outliers = is_outlier(sites[side].norms, scales[side], threshold)
            meter = Meter(f"cross-evaluation on {side}", len(sequences), "sequences")
            sums = evaluate_model(
                models.splicer(side),
                sequences,
                sites[side],
                section,
                saes,
                norm_scale=scales[side],
                counted=counted_positions(section.positions, outliers, outlier_policies),
                scale_policies=scale_policies,
                group_size=batch_size if averaging == "batch" else len(sequences),
                batch_size=batch_size,
                device=models.device,
                progress=meter.update,
            )
            for key, result in sums.items():
                label = CellLabel.of(
                    by_name[key.sae],
                    section="pile",
                    model=side,
                    hook_name=hook_name,
                    dtype=dtype,
                    scale=key.scale,
                    norm_scale=scales[side],
                    outliers=key.outliers,
                    outlier_threshold=threshold,
                    averaging=averaging,
                )
                cells.append(Cell(label, result, int(outliers.sum()), by_name[key.sae].role))
    order = {side: i for i, side in enumerate(sites)}
    cells.sort(key=lambda cell: order[cell.label.model])  # a stable sort: SAEs and policies keep the file's order
    write_rows(directory, cells, averaging, batch_size)
    return scales
