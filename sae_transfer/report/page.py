"""Everything that a run's results allow: tables, figures, and one HTML file that holds them and opens anywhere."""

from pathlib import Path

from sae_transfer.config import Report
from sae_transfer.errors import StudyError
from sae_transfer.report import figures, frontier_figures, outlier_figures, weight_figures, words
from sae_transfer.report.cells import sae_labels
from sae_transfer.report.document import Document, Section, write_document
from sae_transfer.report.formats import Table
from sae_transfer.report.gap_tables import equal_l0_table, judgements, transfer_table, verdict_table
from sae_transfer.report.outlier_tables import outlier_table, outlier_token_table, threshold_table
from sae_transfer.report.published import find_pair, published, published_outlier_table, published_table
from sae_transfer.report.results import Cells, Results
from sae_transfer.report.style import styled
from sae_transfer.report.tables import (
    budget_table,
    cross_eval_table,
    finetune_table,
    instruct_table,
    long_table,
    trained_tokens,
)
from sae_transfer.report.verdict import rule
from sae_transfer.report.weight_tables import activation_table, weight_table


def write_report(run: Path) -> Path:
    """Write report/{tables,figures}/* and report/index.html from results alone.

    Args:
        run: A run directory; stages that were not run leave a line that names their verb.

    Returns:
        The page.

    Raises:
        StudyError: Nothing has been run at all, a file is not readable, or the report cannot be written.
    """
    results = Results(run)
    if results.empty:
        raise StudyError(f"{run}: there are no results to report", "sae-transfer cross-eval CONFIG")
    with styled():
        sections = _sections(results)
    judged = judgements(results.cross_eval, _margin(results)) if results.cross_eval else []
    document = Document(
        title=f"SAE transfer: {results.study.name if results.study else results.manifest.get('study', 'a study')}",
        introduction=words.study_in_words(results),
        headlines=words.headlines(judged),
        rule=rule(_margin(results)),
        seeds_known=any(judgement.noise_floor is not None for judgement in judged),
        sections=sections,
        n_sequences=int(results.cross_eval.rows[0]["n_sequences"]) if results.cross_eval else None,
        scale_ratio=words.scale_ratio(results),
        provenance=words.provenance(results),
    )
    return write_document(document, run / "report")


def _sections(results: Results) -> list[Section]:
    absent = words.missing(results)
    # Tables without lines remove the files of an earlier evaluation.
    cells = results.cross_eval or Cells([], [], [])
    instruct = results.instruct or Cells([], [], [])
    verdicts = verdict_table(cells, _margin(results))
    pair = find_pair(results.study)
    return [
        Section(
            "verdict", "Verdict", tables=[verdicts], missing=absent.get("cross-eval") or _nothing_to_judge(verdicts)
        ),
        Section(
            "cross-eval",
            "Cross-evaluation",
            tables=[cross_eval_table(cells), transfer_table(cells), equal_l0_table(cells), long_table(cells)],
            plots=[*figures.ce_bars(cells), *frontier_figures.frontiers(cells)],
            missing=absent.get("cross-eval"),
        ),
        Section(
            "outliers",
            "Outliers",
            words=words.outlier_words(results),
            tables=[
                outlier_table(results),
                outlier_token_table(results),
                threshold_table(results, sae_labels(cells.rows)),
            ],
            plots=[
                *outlier_figures.norm_histogram(results),
                *outlier_figures.error_by_norm(results),
                *outlier_figures.threshold_sweep(results),
            ],
            missing=absent.get("outliers"),
        ),
        Section(
            "instruct",
            "Instruction data",
            words=words.instruct_words(results),
            tables=[
                instruct_table(instruct),
                transfer_table(instruct, "instruct_transfer"),
                long_table(instruct, "instruct_long"),
            ],
            plots=figures.instruct_bars(instruct),
            missing=absent.get("instruct"),
        ),
        Section(
            "finetune",
            "Fine-tuning",
            tables=[finetune_table(cells), budget_table(cells, trained_tokens(results))],
            plots=figures.finetune_budgets(cells, trained_tokens(results)),
            missing=absent.get("finetune"),
        ),
        Section(
            "weights",
            "Weights and activations",
            tables=[weight_table(results), activation_table(results)],
            plots=weight_figures.weight_differences(results),
            missing=absent.get("weights"),
        ),
        Section("training", "Training", plots=figures.training_curves(results), missing=absent.get("training")),
        Section(
            "published",
            "Against the published numbers",
            words=_published_words(pair),
            tables=[published_table(results), published_outlier_table(results)],
            missing=None
            if pair
            else "The pair and site are none of the post's three: nothing is published to compare with.",
        ),
    ]


def _nothing_to_judge(verdicts: Table) -> str | None:
    if verdicts.printed:
        return None
    return "No SAE has a counterpart of equal settings trained on the other model: there is nothing to judge."


def _margin(results: Results) -> float:
    return (results.study.report if results.study else Report()).margin


def _published_words(pair: str | None) -> list[str]:
    if pair is None:
        return []
    source = published()["source"]
    return [
        f"{source['title']} ({source['authors']}, {source['year']}; {source['url']}): unrounded values of its result"
        f" files, pair {pair}, SAE width {published()['pairs'][pair]['width']:,}. Its tokens are not ours, nor,"
        " where ours are pooled, its averages: small differences are no failure."
    ]
