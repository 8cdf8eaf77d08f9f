"""The stages that evaluate: what their numbers depend on, and the call that makes them."""

import json
import logging
from pathlib import Path

import numpy as np

from sae_transfer.analysis.cross_eval import cross_evaluate
from sae_transfer.analysis.instruct import ROLLOUTS_FILE, evaluate_instructions, make_rollouts, threshold_of
from sae_transfer.analysis.norms import choose_threshold, is_outlier
from sae_transfer.analysis.outliers import describe_outliers
from sae_transfer.analysis.weights import compare
from sae_transfer.config import SIDES, Instruct, require_saes
from sae_transfer.saes.store import WEIGHTS_FILE
from sae_transfer.stages.context import Context, dataset_digests, fingerprint_of_tokenizer
from sae_transfer.stages.stored import (
    budgeted_directories,
    load_saes,
    own_directories,
    own_trained,
    sae_inputs,
    trained_directories,
)
from sae_transfer.study import (
    file_digest,
    scratch_in,
)

logger = logging.getLogger(__name__)


def cross_eval(context: Context) -> None:
    """Evaluate every SAE on both models."""
    study, evaluate = context.study, context.study.evaluate
    require_saes(study)
    own = own_directories(context)
    scales = context.scales_if_fixed()
    inputs = {
        **context.inputs(*SIDES),
        "evaluate": evaluate.model_dump(mode="json", exclude={"tokens"}),
        "norm scales": scales,
        "dtype": context.evaluation_dtype,
        **sae_inputs(context, own),
    }

    def work() -> None:
        measured = cross_evaluate(
            context.run.root / "cross_eval",
            context.models_for_evaluation(),
            context.token_set,
            lambda norm_scales: load_saes(context, own, study.external_saes, norm_scales),
            hook_name=study.site.hook_name,
            norm_scales=scales,
            outlier_threshold=evaluate.outlier_threshold,
            outlier_policies=evaluate.outliers,
            scale_policies=evaluate.scale,
            averaging=evaluate.averaging,
            batch_size=evaluate.batch_size,
            dtype=context.evaluation_dtype,
        )
        if scales is None:
            context.write_scales(measured, "the evaluation tokens")

    context.stage("cross-eval", inputs, work, outputs=[context.run.root / "cross_eval" / "rows.csv"])


def outliers(context: Context) -> None:
    """Norms over the evaluation tokens and what the outliers are; the sweep over thresholds for one SAE a model."""
    study, evaluate = context.study, context.study.evaluate
    # the sweep is about thresholds: the first SAE of each model stands for the others
    there = [path for path in trained_directories(context) if (path / WEIGHTS_FILE).exists()]
    first = {path.name.split("-")[0]: path for path in reversed(there)}
    own = [first[side] for side in SIDES if side in first]
    sides = {} if own else {sae.trained_on: sae for sae in reversed(study.external_saes)}
    external = list(sides.values())
    scales = context.scales_if_fixed()
    inputs = {
        **context.inputs(*SIDES),
        "evaluate": [evaluate.outlier_threshold, "excluded" in evaluate.outliers],
        "norm scales": scales,
        "dtype": context.evaluation_dtype,
        **sae_inputs(context, own),
    }

    def work() -> None:
        tokenizer = context.base_tokenizer()
        measured = describe_outliers(
            context.run.root / "outliers",
            context.models_for_evaluation(),
            context.token_set,
            lambda token: tokenizer.decode([token]) if tokenizer else f"<{token}>",
            lambda norm_scales: load_saes(context, own, external, norm_scales),
            norm_scales=scales,
            outlier_threshold=evaluate.outlier_threshold,
            outlier_policies=evaluate.outliers,
            batch_size=evaluate.batch_size,
        )
        if scales is None:
            context.write_scales(measured, "the evaluation tokens")

    context.stage("outliers", inputs, work)


def instruct(context: Context) -> None:
    """Evaluate the SAEs on instructions and the chat model's answers."""
    study, instruct = context.study, context.study.instruct
    if instruct is None:
        logger.info("instruct: the study has no section instruct, nothing to do")
        return
    require_saes(study)
    directory = context.run.root / "instruct"
    _rollouts(context, instruct, directory)
    finetuned = budgeted_directories(context, "finetuned", max(study.finetune.tokens)) if study.finetune else []
    own = [*own_trained(context), *finetuned]
    context.require("cross-eval", "the pile is not evaluated yet, which gives scales and threshold", "cross-eval")
    threshold = threshold_of(context.run.root / "cross_eval" / "rows.csv")
    scales = json.loads((context.run.root / "scales.json").read_text(encoding="utf-8"))
    evaluate = study.evaluate
    inputs = {
        "chat model": context.fingerprints["chat"],
        "site": study.site.hook_name,
        "rollouts": file_digest(directory / ROLLOUTS_FILE),
        "sections": instruct.sections,
        "evaluate": [threshold, evaluate.outliers, evaluate.scale],
        "norm scales": [scales[side] for side in SIDES],
        "dtype": context.evaluation_dtype,
        **sae_inputs(context, own),
    }

    def work() -> None:
        evaluate_instructions(
            directory,
            context.models_for_evaluation(),
            load_saes(context, own, study.external_saes, scales),
            sections=instruct.sections,
            hook_name=study.site.hook_name,
            norm_scale=scales["chat"],
            threshold=threshold,
            outlier_policies=evaluate.outliers,
            scale_policies=evaluate.scale,
            batch_size=instruct.batch_size,
            dtype=context.evaluation_dtype,
        )

    context.stage("instruct", inputs, work)


def _rollouts(context: Context, instruct: Instruct, directory: Path) -> None:
    given = Path(instruct.rollouts) if instruct.rollouts else None
    inputs = {
        "chat model": context.fingerprints["chat"],
        "instruct": instruct.model_dump(mode="json", exclude={"sections", "batch_size", "rollouts"}),
        "content of the dataset": dataset_digests(instruct.dataset),
        "given rollouts": file_digest(given) if given else None,
        "tokenizer": fingerprint_of_tokenizer(context.checkpoints["chat"]),
        "dtype": context.evaluation_dtype,
    }

    def work() -> None:
        make_rollouts(
            directory,
            context.checkpoints["chat"],
            dataset=instruct.dataset,
            n=instruct.n,
            seed=instruct.seed,
            template=instruct.template,
            given=given,
            max_new_tokens=instruct.max_new_tokens,
            batch_size=instruct.batch_size,
            dtype=context.evaluation_dtype,
            device=context.device,
        )

    context.stage("rollouts", inputs, work, verb="instruct")


def weights(context: Context) -> None:
    """Compare the two models' weights, and their activations on the evaluation tokens."""
    study = context.study
    scales = context.scales_if_fixed()
    evaluate = study.evaluate
    inputs = {
        **context.inputs(*SIDES),
        "evaluate": [evaluate.outlier_threshold, "excluded" in evaluate.outliers],
        "norm scales": scales,
        "dtype": context.evaluation_dtype,
    }

    def work() -> None:
        directory = context.run.root / "weights"
        models = context.models_for_evaluation()
        with scratch_in(directory) as scratch:
            sites = models.collect(context.token_set.evaluation, study.evaluate.batch_size, scratch)
            used = scales or {side: site.norm_scale for side, site in sites.items()}
            norms = {side: site.norms * used[side] for side, site in sites.items()}
            threshold = choose_threshold(evaluate.outlier_threshold, evaluate.outliers, norms)
            outliers = np.logical_or(*(is_outlier(site.norms, used[s], threshold) for s, site in sites.items()))
            acts = {side: site.acts for side, site in sites.items()}
            compare(directory, context.checkpoints, acts, norm_scales=used, outliers=outliers)

    context.stage("weights", inputs, work)


def report(context: Context) -> None:
    """Write tables, figures and the page from what is there; cheap, so done whenever asked."""
    from sae_transfer.report.page import write_report

    write_report(context.run.root)
    context.tracker.log_results(
        context.run.root, [path.parent for path in context.run.root.glob("saes/*/provenance.json")]
    )
