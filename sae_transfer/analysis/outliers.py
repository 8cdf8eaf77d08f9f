"""The stage: norms over the evaluation tokens, what the outliers are, and what depends on the threshold."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sae_transfer.analysis.cells import Section, evaluate_model, scale_factor
from sae_transfer.analysis.metrics import METRICS, Bootstrap
from sae_transfer.analysis.norms import Gap, OutlierPolicy, find_gap
from sae_transfer.analysis.site import OneModelAtATime, SiteActivations
from sae_transfer.errors import StudyError, first_line
from sae_transfer.models.passes import AT_ONCE
from sae_transfer.models.tokens import TokenSet
from sae_transfer.progress import Meter
from sae_transfer.saes.store import StoredSAE
from sae_transfer.study import scratch_in, write_text

logger = logging.getLogger(__name__)

# A position takes the first kind that fits; METHOD's order.
KINDS = ("bos_first", "bos_later", "first_newline", "newline", "paragraph", "early", "other")
PARAGRAPH_SYMBOLS = "¶§"
EARLY_POSITIONS = 9  # positions 1 to 9
TOP_TOKENS = 10  # of a kind
HISTOGRAM_BINS = 80
SWEEP_POINTS = 7  # besides the study's own threshold
SCATTER_SAMPLE, SCATTER_SEED = 4000, 0  # positions that are no outliers


def kinds_of(sequences: NDArray[np.integer], bos_token_id: int | None, texts: Mapping[int, str]) -> NDArray[np.uint8]:
    """The kind of every position, as an index into `KINDS`, `[seq pos]`.

    Args:
        sequences: Token ids `[seq pos]`.
        bos_token_id: None where there is none.
        texts: Id -> text, of every id in the sequences.
    """

    def having(symbols: str) -> NDArray[np.bool_]:
        ids = [token for token, text in texts.items() if any(symbol in text for symbol in symbols)]
        return np.isin(sequences, ids)

    position = np.broadcast_to(np.arange(sequences.shape[1]), sequences.shape)
    is_bos = np.zeros(sequences.shape, bool) if bos_token_id is None else sequences == bos_token_id
    newline = having("\n") & ~is_bos
    fits = (
        is_bos & (position == 0),
        is_bos,
        newline & (newline.cumsum(1) == 1),
        newline,
        having(PARAGRAPH_SYMBOLS),
        (position >= 1) & (position <= EARLY_POSITIONS),
        np.ones(sequences.shape, bool),
    )
    return np.select(fits, list(range(len(KINDS)))).astype(np.uint8)


def describe_outliers(
    directory: Path,
    models: OneModelAtATime,
    token_set: TokenSet,
    decode: Callable[[int], str],
    load_saes: Callable[[Mapping[str, float]], Sequence[StoredSAE]],
    *,
    norm_scales: Mapping[str, float] | None,
    outlier_threshold: float | str,
    outlier_policies: Sequence[OutlierPolicy],
    batch_size: int,
) -> dict[str, float]:
    """Write rows.csv, tokens.csv, histogram.csv and auto.json; with SAEs also scatter.csv and thresholds.csv.

    Args:
        directory: `outliers/` of the run; activations lie there while it works.
        models: `base` and `chat`.
        token_set: Its evaluation sequences are used.
        decode: Token id -> text.
        load_saes: Given c_m of each model, the SAEs to sweep; may give none.
        norm_scales: c_m of each model; None measures them on the evaluation tokens.
        outlier_threshold: T, or `auto`.
        outlier_policies: Only `excluded` needs a T; without it, and where `auto` finds none, no position is an outlier.
        batch_size: Sequences a pass.

    Returns:
        c_m of each model, as given or measured.

    Raises:
        StudyError: Something does not fit, or `auto` finds no threshold.
    """
    sequences = token_set.evaluation
    texts = {int(token): decode(int(token)) for token in np.unique(sequences)}
    kinds = kinds_of(sequences, token_set.bos_token_id, texts)
    with scratch_in(directory) as scratch:
        sites = models.collect(sequences, batch_size, scratch)
        scales = dict(norm_scales or {side: site.norm_scale for side, site in sites.items()})
        norms = {side: site.norms * scales[side] for side, site in sites.items()}
        threshold = _write_auto(directory, norms, outlier_threshold, outlier_policies)
        _write_breakdown(directory, norms, scales, threshold, outlier_threshold, kinds, sequences, texts)
        _write_histogram(directory, norms, kinds)
        saes = load_saes(scales)
        if saes:
            _write_scatter(directory, sites, norms, scales, threshold, kinds, sequences, texts, saes, models.device)
            thresholds = _sweep_points(threshold, norms)
            _write_sweep(directory, models, sites, norms, scales, sequences, saes, thresholds, batch_size)
    return scales


def _write_auto(
    directory: Path,
    norms: Mapping[str, NDArray[np.float64]],
    asked: float | str,
    policies: Sequence[OutlierPolicy],
) -> float:
    """Say what `auto` finds, whether or not it was asked for; the threshold to use."""
    try:
        gap: Gap | None = find_gap(list(norms.values()))
        explanation = gap.explanation
    except StudyError as error:
        if isinstance(asked, str) and "excluded" in policies:
            raise
        gap, explanation = None, first_line(error)
    found = {"threshold": gap.threshold, "low": gap.low, "high": gap.high} if gap else {"threshold": None}
    content = {**found, "asked": asked, "explanation": explanation}
    write_text(directory / "auto.json", json.dumps(content, indent=2) + "\n")
    logger.info("%s", explanation)
    if not isinstance(asked, str):
        return asked
    return gap.threshold if gap else float(np.ceil(max(scaled.max() for scaled in norms.values())))


def _write_breakdown(
    directory: Path,
    norms: Mapping[str, NDArray[np.float64]],
    scales: Mapping[str, float],
    threshold: float,
    asked: float | str,
    kinds: NDArray[np.uint8],
    sequences: NDArray[np.integer],
    texts: Mapping[int, str],
) -> None:
    rows, top = [], []
    for side, scaled in norms.items():
        above = scaled > threshold
        n_outliers = int(above.sum())
        for index, kind in enumerate(KINDS):
            chosen = above & (kinds == index)
            n_kind = int(chosen.sum())
            rows.append(
                {
                    "model": side,
                    "norm_scale": scales[side],
                    "threshold": threshold,
                    "threshold_source": "auto" if isinstance(asked, str) else "given",
                    "n_tokens": scaled.size,
                    "n_outliers": n_outliers,
                    "fraction": n_outliers / scaled.size,
                    "kind": kind,
                    "n_kind": n_kind,
                    "share": n_kind / n_outliers if n_outliers else "",
                }
            )
            for token, count in Counter(sequences[chosen].tolist()).most_common(TOP_TOKENS):
                of_token = scaled[chosen & (sequences == token)]
                text = json.dumps(texts[token], ensure_ascii=False)
                entry = {"model": side, "kind": kind, "token_id": token, "token": text, "count": count}
                top.append({**entry, "mean_norm": of_token.mean(), "max_norm": of_token.max()})
    _write_csv(directory / "rows.csv", rows, rows[0])
    _write_csv(directory / "tokens.csv", top, ["model", "kind", "token_id", "token", "count", "mean_norm", "max_norm"])


def _write_histogram(directory: Path, norms: Mapping[str, NDArray[np.float64]], kinds: NDArray[np.uint8]) -> None:
    lowest, highest = min(n.min() for n in norms.values()), max(n.max() for n in norms.values())
    edges = np.geomspace(max(lowest, 1e-3 * highest) * 0.999, highest * 1.001, HISTOGRAM_BINS + 1)
    rows = []
    for side, scaled in norms.items():
        for index, kind in enumerate(KINDS):
            counts, _ = np.histogram(scaled[kinds == index], edges)
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
                if count:
                    rows.append({"model": side, "kind": kind, "low": low, "high": high, "count": count})
    _write_csv(directory / "histogram.csv", rows, rows[0])


@torch.inference_mode()
def _write_scatter(
    directory: Path,
    sites: Mapping[str, SiteActivations],
    norms: Mapping[str, NDArray[np.float64]],
    scales: Mapping[str, float],
    threshold: float,
    kinds: NDArray[np.uint8],
    sequences: NDArray[np.integer],
    texts: Mapping[int, str],
    saes: Sequence[StoredSAE],
    device: str,
) -> None:
    """Squared error against norm of each SAE on the opposite model: all outliers, and a sample of the others."""
    rows = []
    for sae in saes:
        side = "chat" if sae.trained_on == "base" else "base"
        scaled = norms[side]
        others = np.flatnonzero(scaled.ravel() <= threshold)
        generator = np.random.default_rng(SCATTER_SEED)
        sample = generator.choice(others, min(SCATTER_SAMPLE, len(others)), replace=False)
        chosen = np.concatenate([np.flatnonzero(scaled.ravel() > threshold), np.sort(sample)])
        where = np.unravel_index(chosen, scaled.shape)
        acts = torch.from_numpy(sites[side].acts[where])
        parts = acts.split(AT_ONCE[torch.device(device).type].positions(sae.d_sae))
        errors = np.concatenate([_squared_errors(sae, part.to(device), scales[side]) for part in parts])
        for sequence, position, error in zip(*where, errors, strict=True):
            token = int(sequences[sequence, position])
            rows.append(
                {
                    "model": side,
                    "sae": sae.name,
                    "kind": KINDS[kinds[sequence, position]],
                    "token": json.dumps(texts[token], ensure_ascii=False),
                    "sequence": sequence,
                    "position": position,
                    "scaled_norm": scaled[sequence, position],
                    "squared_error": error,
                }
            )
    _write_csv(directory / "scatter.csv", rows, rows[0])


def _squared_errors(sae: StoredSAE, acts: Float[Tensor, "tok d_model"], norm_scale: float) -> NDArray[np.float64]:
    """Squared error of each position, in the model's scaled units."""
    _, decoded = sae.reconstruct(acts, scale_factor(sae, norm_scale, "matched"))
    return ((acts - decoded) * norm_scale).square().sum(-1, dtype=torch.float64).cpu().numpy()


def _sweep_points(threshold: float, norms: Mapping[str, NDArray[np.float64]]) -> list[float]:
    """The study's threshold among others, from one that removes a few percent to one that removes nothing."""
    lowest = max(float(np.quantile(scaled, 0.95)) for scaled in norms.values())
    highest = max(float(scaled.max()) for scaled in norms.values())
    grid = np.geomspace(lowest, highest, SWEEP_POINTS)
    return sorted({threshold, *(float(f"{point:.3g}") for point in grid[:-1]), float(np.ceil(highest))})


def _write_sweep(
    directory: Path,
    models: OneModelAtATime,
    sites: Mapping[str, SiteActivations],
    norms: Mapping[str, NDArray[np.float64]],
    scales: Mapping[str, float],
    sequences: NDArray[np.integer],
    saes: Sequence[StoredSAE],
    thresholds: Sequence[float],
    batch_size: int,
) -> None:
    """Every metric with the positions above each threshold excluded, matched scale."""
    section = Section.whole(sequences.shape)
    bootstrap = Bootstrap(len(sequences), "pooled", batch_size)
    rows = []
    for side in reversed(list(sites)):  # the last one is still loaded
        cells = evaluate_model(
            models.splicer(side),
            sequences,
            sites[side],
            section,
            saes,
            norm_scale=scales[side],
            counted={str(threshold): norms[side] <= threshold for threshold in thresholds},
            scale_policies=("matched",),
            group_size=len(sequences),
            batch_size=batch_size,
            device=models.device,
            progress=Meter(f"thresholds on {side}", len(sequences), "sequences").update,
        )
        trained_on = {sae.name: sae.trained_on for sae in saes}
        for key, cell in cells.items():
            values = {**bootstrap.summarise(cell.sums).values, "frac_alive": float(cell.alive.mean())}
            rows.append(
                {
                    "threshold": float(key.outliers),
                    "sae": key.sae,
                    "sae_trained_on": trained_on[key.sae],
                    "model": side,
                    "fraction_removed": float((norms[side] > float(key.outliers)).mean()),
                    **{metric: values[metric] for metric in METRICS},
                }
            )
    _write_csv(directory / "thresholds.csv", rows, rows[0])


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
