"""The stage: SAEs on the chat model over instructions and its own answers, section by section."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_transfer.analysis.cells import ScalePolicy, Section, evaluate_model
from sae_transfer.analysis.metrics import Averaging
from sae_transfer.analysis.norms import OutlierPolicy, counted_positions, is_outlier
from sae_transfer.analysis.rows import Cell, CellLabel, write_rows
from sae_transfer.analysis.site import OneModelAtATime, collect_activations
from sae_transfer.models.chat import (
    Answered,
    SectionName,
    context_length_of,
    end_of_turn_ids,
    generate_rollouts,
    given_rollouts,
    keep_answered,
    make_prompts,
    pack,
    read_rollouts,
    section_mask,
    write_rollouts,
)
from sae_transfer.models.instructions import read_exchanges, read_instructions
from sae_transfer.models.pair import Checkpoint, load_model, load_tokenizer
from sae_transfer.progress import Meter
from sae_transfer.saes.store import StoredSAE
from sae_transfer.study import scratch_in, write_json

logger = logging.getLogger(__name__)

ROLLOUTS_FILE, SUMMARY_FILE = "rollouts.jsonl", "summary.json"
# A mean over batches is the post's rule for the pile; its sections are pooled.
AVERAGING: Averaging = "pooled"


def make_rollouts(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    dataset: str,
    n: int,
    seed: int,
    template: str | None,
    given: Path | None,
    max_new_tokens: int,
    batch_size: int,
    dtype: str,
    device: str,
) -> None:
    """Draw instructions, have the chat model answer them greedily, and write rollouts.jsonl and summary.json.

    Args:
        directory: `instruct/` of the run.
        checkpoint: The chat model.
        dataset: As in `read_instructions`; so are the next two.
        n: See `dataset`.
        seed: See `dataset`.
        template: Prompt with `{instruction}` in it; None takes the tokenizer's chat template.
        given: JSONL of instructions and completions, used instead of drawing and generating.
        max_new_tokens: Longest answer.
        batch_size: Rows a batch; changes no token.
        dtype: Of the model.
        device: A torch device.

    Raises:
        StudyError: No usable row, template or answer, or a row too long for the model.
    """
    tokenizer = load_tokenizer(checkpoint)
    model: Any = load_model(checkpoint, dtype=dtype, device=device)
    if given is not None:
        exchanges = read_exchanges(given)
        prompts = make_prompts(tokenizer, [exchange.instruction for exchange in exchanges], template)
        completions = [exchange.completion for exchange in exchanges]
        rollouts = given_rollouts(tokenizer, prompts, completions, context_length=context_length_of(model))
        answered = keep_answered(rollouts, n_drawn=len(exchanges), n_with_input=0)
    else:
        drawn = read_instructions(dataset, n=n, seed=seed)
        rollouts = generate_rollouts(
            model,
            tokenizer,
            make_prompts(tokenizer, drawn.texts, template),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            end_ids=end_of_turn_ids(model, tokenizer),
            progress=Meter("rollouts", len(drawn.texts), "rows").update,
        )
        answered = keep_answered(rollouts, n_drawn=drawn.n_drawn, n_with_input=drawn.n_with_input)
    write_rollouts(directory / ROLLOUTS_FILE, answered.rollouts)
    write_json(directory / SUMMARY_FILE, _summary(answered, template, max_new_tokens, given))


def _summary(answered: Answered, template: str | None, max_new_tokens: int, given: Path | None) -> dict[str, Any]:
    n_used, n_unfinished = len(answered.rollouts), answered.counts.n_unfinished
    share = None if n_unfinished is None else n_unfinished / n_used
    logger.info(
        "rollouts: %d rows used, %d dropped for an empty answer%s",
        n_used,
        answered.counts.n_empty,
        "" if share is None else f", {share:.0%} unfinished after {max_new_tokens} tokens (normal, kept whole)",
    )
    return {
        "n_drawn": answered.counts.n_drawn,
        "n_with_input_dropped": answered.counts.n_with_input,
        "n_empty": answered.counts.n_empty,
        "n_used": n_used,
        "n_unfinished": n_unfinished,
        "share_unfinished": share,
        "template": template or "the tokenizer's chat template",
        "max_new_tokens": max_new_tokens,
        "source": "generated" if given is None else "given",
    }


def evaluate_instructions(
    directory: Path,
    models: OneModelAtATime,
    saes: Sequence[StoredSAE],
    *,
    sections: Sequence[SectionName],
    hook_name: str,
    norm_scale: float,
    threshold: float | None,
    outlier_policies: Sequence[OutlierPolicy],
    scale_policies: Sequence[ScalePolicy],
    batch_size: int,
    dtype: str,
) -> None:
    """Evaluate on the rollouts that are there; write rows.csv, transfer.csv and sums.npz.

    Args:
        directory: `instruct/` of the run, with its rollouts.
        models: Of which the chat model is used.
        saes: To be evaluated.
        sections: Of `rollout`, `user_prompt`, `control`; each is spliced and counted by itself.
        hook_name: The site, for the rows.
        norm_scale: c of the chat model, from the pile.
        threshold: T, that of the pile; None where no position is excluded.
        outlier_policies: Of `excluded`, `kept`.
        scale_policies: Of `matched`, `raw`.
        batch_size: Rows a pass; changes no number.
        dtype: Of the model, for the rows.
    """
    rollouts = read_rollouts(directory / ROLLOUTS_FILE)
    packed = pack(rollouts, pad_id=0)
    real = np.arange(packed.ids.shape[1]) < packed.lengths[:, None]
    splicer = models.splicer("chat")
    by_name = {sae.name: sae for sae in saes}
    cells: list[Cell] = []
    with scratch_in(directory) as scratch:
        site = collect_activations(
            splicer,
            packed.ids,
            d_model=models.checkpoints["chat"].d_model,
            batch_size=batch_size,
            device=models.device,
            path=scratch / "chat.npy",
            progress=Meter("activations of chat", len(rollouts), "rows").update,
        )
        outliers = is_outlier(site.norms, norm_scale, threshold) & real
        for name in sections:
            section = Section(*section_mask(rollouts, name))
            sums = evaluate_model(
                splicer,
                packed.ids,
                site,
                section,
                saes,
                norm_scale=norm_scale,
                counted=counted_positions(section.positions, outliers, outlier_policies),
                scale_policies=scale_policies,
                group_size=len(rollouts),
                batch_size=batch_size,
                device=models.device,
                progress=Meter(f"section {name}", len(rollouts), "rows").update,
            )
            for key, result in sums.items():
                label = CellLabel.of(
                    by_name[key.sae],
                    section=name,
                    model="chat",
                    hook_name=hook_name,
                    dtype=dtype,
                    scale=key.scale,
                    norm_scale=norm_scale,
                    outliers=key.outliers,
                    outlier_threshold=threshold,
                    averaging=AVERAGING,
                )
                n_outliers = int((outliers & section.positions).sum())
                cells.append(Cell(label, result, n_outliers, by_name[key.sae].role))
    write_rows(directory, cells, AVERAGING, batch_size)


def threshold_of(rows_csv: Path) -> float | None:
    """The threshold that cross-evaluation used, from its rows.csv; None when nothing was excluded."""
    import pandas as pd

    thresholds = pd.read_csv(rows_csv)["outlier_threshold"].dropna().unique()
    return float(thresholds[0]) if len(thresholds) else None
