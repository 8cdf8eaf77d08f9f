"""The report's prose: the study in words, what is missing and which verb makes it, provenance."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sae_transfer.config import Study
from sae_transfer.report.cells import role
from sae_transfer.report.gap_tables import DIRECTIONS, Judgement
from sae_transfer.report.results import Results


class Headline(NamedTuple):
    """What the verdicts of one direction under one policy come to."""

    direction: str
    policy: str
    word: str
    division: str


def study_in_words(results: Results) -> list[str]:
    """What was asked, of which models, with which SAEs, on which text; a paragraph each."""
    study = results.study
    paragraphs = []
    if study is not None:
        paragraphs.append(
            f"Does a sparse autoencoder (SAE) trained on the activations of {study.pair.base} (base) reconstruct those"
            f" of {study.pair.chat} (chat), which was fine-tuned from it, and the other way round? Activations are read"
            f" and replaced at {study.site.hook_name}."
        )
        paragraphs.append(_saes_in_words(study))
    if results.cross_eval:
        row = results.cross_eval.rows[0]
        n_tokens = int(row["n_tokens"]) + (row["outliers"] == "excluded") * int(row["n_outliers"])
        dataset = results.manifest.get("token_set", {}).get("dataset", "the token set")
        paragraphs.append(
            f"Every SAE is evaluated on both models over the same {n_tokens:,} held-out tokens of {dataset}, in"
            f" {int(row['n_sequences']):,} sequences."
        )
    if ratio := scale_ratio(results):
        paragraphs.append(
            f"Norm scaling factors: {results.scales['base']:.4g} (base) and {results.scales['chat']:.4g} (chat), so the"
            f" chat model's raw activations are {ratio:.3g} times as long on average as the base model's."
        )
    return paragraphs


def scale_ratio(results: Results) -> float | None:
    """How many times as long the chat model's raw activations are on average; None where that was not measured."""
    base, chat = results.scales.get("base"), results.scales.get("chat")
    return base / chat if base and chat else None


def _saes_in_words(study: Study) -> str:
    specs = study.sae_specs()
    parts = []
    if specs:
        widths = ", ".join(f"{width:,}" for width in sorted({spec.d_sae for spec in specs}))
        tried = {
            key: {s.sparsity_value for s in specs if s.sparsity_key == key} for key in (s.sparsity_key for s in specs)
        }
        sparsities = [f"{key} {', '.join(f'{value:g}' for value in sorted(values))}" for key, values in tried.items()]
        seeds = len({spec.seed for spec in specs})
        parts.append(
            f"{_plural(len(specs), 'SAE')} for each of {' and '.join(study.train.models)}:"
            f" {', '.join(sorted({spec.architecture for spec in specs}))}, width {widths},"
            f" {', '.join(sparsities)}, {_plural(seeds, 'seed')};"
            f" trained on {study.train.tokens:,} tokens of {study.tokens.dataset}."
        )
    if study.finetune:
        budgets = ", ".join(f"{tokens:,}" for tokens in study.finetune.tokens)
        text = {"tokens": "training text", "rollouts": "instructions and answers"}[study.finetune.data]
        parts.append(f"Base SAEs are also fine-tuned on the chat model, on {budgets} tokens of {text}.")
    if study.external_saes:
        parts.append(f"SAEs from elsewhere: {', '.join(sae.name for sae in study.external_saes)}.")
    return " ".join(parts)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def headlines(judged: list[Judgement]) -> list[Headline]:
    """One line a direction and policy: the verdict where all SAEs agree, else how they divide.

    Args:
        judged: All verdicts of a study.

    Returns:
        In their order; a direction without an SAE is left out.
    """
    found = []
    for model, policy in dict.fromkeys((judgement.model, judgement.policy) for judgement in judged):
        all_words = [judgement.word for judgement in judged if (judgement.model, judgement.policy) == (model, policy)]
        counts = {word: all_words.count(word) for word in dict.fromkeys(all_words)}
        word = all_words[0] if len(counts) == 1 else "mixed"
        division = f"all {len(all_words)} SAEs" if len(all_words) > 1 else ""
        if len(counts) > 1:
            division = ", ".join(f"{found_word}: {count}" for found_word, count in counts.items())
        found.append(Headline(DIRECTIONS[model], policy.words, word, division))
    return found


def missing(results: Results) -> dict[str, str]:
    """Section of the report -> why it is empty and which verb fills it, for those that are."""
    study = results.study
    rows = results.cross_eval.rows if results.cross_eval else []
    tuned = any(role(row) == "finetuned" for row in rows)
    tuned_unevaluated = any(log.sae.startswith("finetuned-") for log in results.training)
    notes = {
        "cross-eval": (not rows, "The SAEs have not been evaluated on both models", "cross-eval", True),
        "outliers": (not results.outlier_kinds, "Outliers have not been looked at", "outliers", True),
        "instruct": (
            not results.instruct,
            "Nothing was evaluated on instruction data",
            "instruct",
            bool(study and study.instruct),
        ),
        "finetune": (
            not tuned,
            "Fine-tuned SAEs have not been evaluated" if tuned_unevaluated else "No base SAE has been fine-tuned",
            "cross-eval" if tuned_unevaluated else "finetune",
            bool(study and study.finetune),
        ),
        "weights": (not results.weights_by_kind, "The models' weights have not been compared", "weights", True),
        "training": (not results.training, "No SAE was trained in this run", "train", bool(study and study.saes)),
    }
    sections = {"training": "saes"}
    return {
        section: f"{why}: sae-transfer {verb} CONFIG"
        + ("." if asked else f", once the study file has a section {sections.get(section, section)}.")
        for section, (is_missing, why, verb, asked) in notes.items()
        if is_missing
    }


def outlier_words(results: Results) -> list[str]:
    """How the threshold came about."""
    explanation = str(results.auto_threshold.get("explanation") or "").rstrip(".")
    return [f"Threshold: {explanation}."] if explanation else []


def instruct_words(results: Results) -> list[str]:
    """What was drawn, dropped and used of the instructions."""
    of = results.instruct_summary
    if not of:
        return []
    text = (
        f"{of['n_drawn']} instructions drawn, {of['n_with_input_dropped']} with an input dropped, {of['n_empty']} with"
        f" an empty answer dropped, {of['n_used']} used; answers {of.get('source', 'generated')}, at most"
        f" {of['max_new_tokens']} new tokens; {of['n_unfinished']} ({100 * of['share_unfinished']:.0f}%) unfinished"
        " and kept whole."
    )
    note = (
        "CE on user prompts is hard to read: models are not trained to predict them when instructions are fine-tuned."
    )
    return [text, note]


def provenance(results: Results) -> list[tuple[str, str]]:
    """Everything the manifest records, flat, then scaling factors and when each stage was finished."""
    of = [*_flat("", results.manifest), *_flat("scales", results.scales)]
    stages = [
        (f"stage {name}", f"finished {record['finished']}, {float(record['seconds']):,.1f} s")
        for name, record in results.stages.items()
    ]
    return [*of, *stages]


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), inner)
    elif isinstance(value, list):
        yield path, " ".join(map(str, value)) or "none"
    else:
        yield path, "none" if value is None else str(value)
