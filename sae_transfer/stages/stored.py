"""Which SAEs a study has: its own in the run directory, and those from elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_transfer.config import ExternalSAE
from sae_transfer.errors import StudyError
from sae_transfer.saes.sources import fetch, recorded_identity, same_model
from sae_transfer.saes.store import CONFIG_FILE, WEIGHTS_FILE, StoredSAE, check_fits, load_external, load_own
from sae_transfer.stages.context import Context
from sae_transfer.study import (
    file_digest,
)


def trained_directories(context: Context) -> list[Path]:
    """Where the SAEs of `saes` are or will be, of every model that gets some."""
    names = [f"{side}-{spec.name}" for side in context.study.train.models for spec in context.study.sae_specs()]
    return [context.run.root / "saes" / name for name in names]


def budgeted_directories(context: Context, role: str, *budgets: int) -> list[Path]:
    """Where the SAEs of a role (`finetuned`, `control`) are or will be, budget by budget."""
    names = [f"{role}-{spec.name}-{short_count(b)}" for b in budgets for spec in context.study.sae_specs()]
    return [context.run.root / "saes" / name for name in names]


def own_trained(context: Context) -> list[Path]:
    """The directories of the study's trained SAEs, once all of them are."""
    if context.study.saes is None:
        return []
    for side in context.study.train.models:
        context.require(f"train-{side}", f"the SAEs of the {side} model are not trained yet", "train")
    trained = trained_directories(context)
    for path in trained:
        if not (path / WEIGHTS_FILE).exists():
            raise StudyError(f"{path}: its weights are gone", "sae-transfer train CONFIG makes them again")
    return trained


def own_directories(context: Context) -> list[Path]:
    """Those, and the fine-tuned ones and controls, once all of them are trained."""
    own, finetune = own_trained(context), context.study.finetune
    if finetune is None:
        return own
    context.require("finetune", "the base SAEs are not fine-tuned yet", "finetune")
    own += budgeted_directories(context, "finetuned", *finetune.tokens)
    return own + (budgeted_directories(context, "control", *finetune.tokens) if finetune.control else [])


def load_saes(
    context: Context, own: Sequence[Path], external: Sequence[ExternalSAE], norm_scales: Mapping[str, float]
) -> list[StoredSAE]:
    """Load own SAEs and external ones, and see that they belong to the study's models and site."""
    d_model, hook_name = context.checkpoints["base"].d_model, context.study.site.hook_name
    saes = [load_own(path, context.device) for path in own]
    for sae, path in zip(saes, own, strict=True):
        check_fits(sae, d_model, hook_name, path)
    for asked in external:
        path = _external_directory(context, asked)
        scale = norm_scales[asked.trained_on]
        sae = load_external(asked.name, asked.trained_on, path, asked.scale, scale, context.device)
        check_fits(sae, d_model, hook_name, path, accept_mismatch=asked.accept_mismatch)
        if not asked.accept_mismatch:
            _refuse_other_model(context, asked, sae)
        saes.append(sae)
    return saes


def sae_inputs(context: Context, own: Sequence[Path]) -> dict[str, Any]:
    """Digests of all SAEs, as inputs of a stage."""
    return {
        "SAEs": {path.name: file_digest(path / WEIGHTS_FILE) for path in own},
        "external SAEs": {
            sae.name: [sae.trained_on, sae.scale, sae.accept_mismatch, _external_digest(context, sae)]
            for sae in context.study.external_saes
        },
    }


def _refuse_other_model(context: Context, asked: ExternalSAE, sae: StoredSAE) -> None:
    recorded, _ = recorded_identity(sae.sae.cfg.to_dict())
    checkpoint = context.checkpoints[asked.trained_on]
    if recorded is not None and not same_model(recorded, checkpoint.source, checkpoint.config.get("_name_or_path")):
        raise StudyError(
            f"external_saes.{asked.name}: was trained on {recorded}; the study's {asked.trained_on} model is"
            f" {checkpoint.source}",
            "correct trained_on or the pair, or set accept_mismatch: true on this SAE",
        )


def _external_directory(context: Context, sae: ExternalSAE) -> Path:
    """Where an SAE from elsewhere lies in SAELens's present form; fetched and converted once, into the run."""
    cache = context.run.root / "saes" / "external"
    if sae.path is not None:
        return fetch(sae.path, cache)
    assert sae.release is not None
    return fetch(sae.release, cache, sae_id=sae.id)


def _external_digest(context: Context, sae: ExternalSAE) -> list[str]:
    directory = _external_directory(context, sae)
    return [file_digest(directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]


def short_count(n_tokens: int) -> str:
    """A count as a study file says it: 5M, 50k, 98304."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if n_tokens % size == 0:
            return f"{n_tokens // size}{unit}"
    return str(n_tokens)
