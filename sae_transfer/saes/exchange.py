"""SAEs in and out: one from elsewhere into our form, one of ours to the hub with its table as model card."""

import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_transfer.errors import StudyError
from sae_transfer.saes.sources import fetch, recorded_identity
from sae_transfer.saes.store import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE, load_external
from sae_transfer.study import replacing, write_json

CARD_COLUMNS = {
    "model": ("Model", "{}"),
    "outliers": ("Outliers", "{}"),
    "scale": ("Scale", "{}"),
    "l0": ("L0", "{:.1f}"),
    "ce_recovered": ("CE Loss rec %", "{:.2%}"),
    "ce_delta": ("CE Delta", "{:.4f}"),
    "kl": ("KL", "{:.4f}"),
    "explained_variance_per_token": ("Explained Variance %", "{:.1%}"),
    "mse": ("MSE", "{:.4g}"),
}


def import_sae(source: str, directory: Path, *, sae_id: str | None, scale: float | None) -> None:
    """Bring an SAE from elsewhere into the form in which a study stores its own: folded, float32, with provenance.

    Args:
        source: A directory, a SAELens release (with `sae_id`), a hub repository, or a wandb artifact.
        directory: Where to; new or empty.
        sae_id: Of the release.
        scale: Given when the SAE is unfolded and expects activations times this.

    Raises:
        StudyError: It cannot be had or is no SAE, it expects scaled activations and `scale` is not given, or the
            directory is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise StudyError(f"{directory}: is not empty", "name a new directory")
    with TemporaryDirectory() as cache:
        path = fetch(source, Path(cache), sae_id=sae_id)
        # without a scale it takes raw activations, and which factor they correspond to is the study's to say
        stored = load_external(directory.name, "base", path, scale, 1.0, "cpu")
        with replacing(directory) as temporary:
            stored.sae.save_model(temporary)
            model_name, hook_name = recorded_identity(stored.sae.cfg.to_dict())
            provenance = {"source": source, "id": sae_id, "sae_scale": scale, "model": model_name, "site": hook_name}
            write_json(temporary / PROVENANCE_FILE, provenance)


def push_sae(directory: Path, repository: str) -> str:
    """Upload an SAE of a run to the hub, with the table of its run as model card.

    Args:
        directory: `results/<name>/saes/<id>`.
        repository: `org/name`, made if it is not there.

    Returns:
        Its address.

    Raises:
        StudyError: It is no SAE of a run, it has not been evaluated, or the hub refuses.
    """
    from huggingface_hub import HfApi

    card = model_card(directory)
    files = [WEIGHTS_FILE, CONFIG_FILE, PROVENANCE_FILE]
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        for name in files:
            api.upload_file(path_or_fileobj=directory / name, path_in_repo=name, repo_id=repository)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository)
    except Exception as error:  # huggingface_hub raises many kinds
        raise StudyError(
            f"{repository}: the hub does not take the SAE ({type(error).__name__}: {error})",
            "check the name, the network and the login (`hf auth login`)",
        ) from error
    return f"https://huggingface.co/{repository}"


def model_card(directory: Path) -> str:
    """The model card of an SAE of a run: what it is, how to load it, and its rows of the cross-evaluation.

    Args:
        directory: `results/<name>/saes/<id>`.

    Raises:
        StudyError: It is no SAE of a run, or it has not been evaluated.
    """
    try:
        provenance: dict[str, Any] = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
        config: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{directory}: is no SAE of a run ({error})", "name results/<name>/saes/<id>") from error
    rows_csv = directory.parent.parent / "cross_eval" / "rows.csv"
    if not rows_csv.exists():
        raise StudyError(f"{directory}: has not been evaluated", "sae-transfer cross-eval CONFIG")
    with rows_csv.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["sae"] == directory.name]
    table = [
        "| " + " | ".join(heading for heading, _ in CARD_COLUMNS.values()) + " |",
        "|---" * len(CARD_COLUMNS) + "|",
    ]
    for row in rows:
        cells = [form.format(row[key] if form == "{}" else float(row[key])) for key, (_, form) in CARD_COLUMNS.items()]
        table.append("| " + " | ".join(cells) + " |")
    metadata = config.get("metadata", {})
    trained_on = provenance["trained_on"]
    return "\n".join(
        [
            "---",
            "library_name: saelens",
            "tags: [sparse-autoencoder, sae-transfer]",
            "---",
            f"# {directory.name}",
            "",
            f"A {provenance['architecture']} sparse autoencoder of {provenance['d_sae']} features, trained on"
            f" {provenance['tokens']:,} activations of {metadata.get('model_name')} at {metadata.get('hook_name')}"
            f" ({trained_on}; {provenance['sparsity_key']} {provenance['sparsity_value']}, seed {provenance['seed']}).",
            "",
            "It takes raw activations: the norm scaling factor"
            f" {provenance['sae_scale']:.6g} that it was trained with is folded into its weights.",
            "",
            "```python",
            "from sae_lens import SAE",
            f'sae = SAE.load_from_disk("{directory.name}")  # the downloaded files',
            "```",
            "",
            "Evaluated on both models of the pair by sae-transfer (definitions there):",
            "",
            *table,
            "",
        ]
    )
