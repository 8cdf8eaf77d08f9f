"""SAEs on disk in SAELens's folded form, with the factor and the provenance that SAELens's own file cannot hold."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from safetensors import SafetensorError
from torch import Tensor

from sae_transfer.errors import StudyError, first_line, is_out_of_memory
from sae_transfer.study import replacing, write_json

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE, PROVENANCE_FILE = "sae_weights.safetensors", "cfg.json", "provenance.json"
# These scale each token at run time by its own norm: no factor can be folded in, and both scale policies agree.
PER_TOKEN_NORMALIZATION = ("constant_norm_rescale", "layer_norm")
SPARSITY_KEYS = ("l1_coefficient", "l0_coefficient", "k")


@dataclass(frozen=True)
class StoredSAE:
    """An SAE as evaluation sees it: folded, taking raw activations of the model that it was trained on.

    Attributes:
        name: Its id in tables.
        trained_on: `base`, `chat` or `finetuned`.
        sae: SAELens's inference SAE, float32.
        scale: c_s, the factor folded in; None when it normalizes each token itself.
        sparsity_key: SAELens's name of the sparsity setting, None when unknown.
        sparsity_value: Its value.
        seed: Of its initial weights, None when unknown.
        role: `trained`; `finetuned` from a base SAE; `control`, from scratch on a fine-tuning budget.
    """

    name: str
    trained_on: str
    sae: SAE[Any]
    scale: float | None
    sparsity_key: str | None = None
    sparsity_value: float | None = None
    seed: int | None = None
    role: str = "trained"

    @property
    def architecture(self) -> str:
        """As the SAE was trained: a batchtopk SAE is a JumpReLU at inference, and stays named batchtopk."""
        return self.sae.cfg.metadata.get("training_architecture") or self.sae.cfg.architecture()

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.sae.cfg.d_sae

    @torch.inference_mode()
    def reconstruct(
        self, acts: Float[Tensor, "tok d_model"], factor: float
    ) -> tuple[Float[Tensor, "tok d_sae"], Float[Tensor, "tok d_model"]]:
        """Features and reconstruction of raw activations of the evaluated model.

        Args:
            acts: Raw activations x of model m, float32.
            factor: What the SAE's input is multiplied by, and its output divided by: c_m / c_s under `matched`, 1 under
                `raw`.

        Returns:
            Feature activations, and the reconstruction in the units of `acts`.
        """
        features = self.sae.encode(acts * factor if factor != 1 else acts)
        decoded = self.sae.decode(features)
        return features, decoded / factor if factor != 1 else decoded


def is_finite(sae: SAE[Any] | TrainingSAE[Any]) -> bool:
    """Whether all its weights are finite numbers."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in sae.state_dict().values())


def save_trained(sae: TrainingSAE[Any], scale: float, directory: Path, provenance: Mapping[str, Any]) -> None:
    """Fold the factor into a trained SAE and write it as SAELens's inference form, beside its provenance.

    Args:
        sae: Trained in scaled space; it is folded in place and not to be trained on.
        scale: c of the model that it was trained on.
        directory: `saes/<id>`; what stands there under the same file names is replaced.
        provenance: Written to provenance.json, with `sae_scale`.

    Raises:
        StudyError: The place cannot be written.
    """
    if not is_finite(sae):
        raise StudyError(
            f"{directory}: the trained weights are not finite; nothing was stored",
            "lower train.lr, or leave out extreme activations (train.drop_norm_above: 10)",
        )
    sae.fold_activation_norm_scaling_factor(scale)
    with replacing(directory / WEIGHTS_FILE) as weights, replacing(directory / CONFIG_FILE) as config:
        sae.save_inference_model(weights.parent)
        # SAELens writes the keys in an order that differs from process to process
        written = json.loads((weights.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        config.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_json(directory / PROVENANCE_FILE, {**provenance, "sae_scale": scale})


def load_own(directory: Path, device: str) -> StoredSAE:
    """Load an SAE of the run directory.

    Raises:
        StudyError: It is damaged or absent.
    """
    try:
        provenance = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{directory}: no readable {PROVENANCE_FILE} ({error})", "train again: sae-transfer train CONFIG --force"
        ) from error
    return StoredSAE(
        name=directory.name,
        trained_on=provenance["trained_on"],
        sae=_load_from_disk(directory, device),
        scale=provenance["sae_scale"],
        sparsity_key=provenance["sparsity_key"],
        sparsity_value=provenance["sparsity_value"],
        seed=provenance["seed"],
        role=provenance["role"],
    )


def load_external(
    name: str, trained_on: str, directory: Path, scale: float | None, model_scale: float, device: str
) -> StoredSAE:
    """Load an SAE from elsewhere in SAELens's form.

    Args:
        name: Its name in tables.
        trained_on: `base` or `chat`.
        directory: Holds cfg.json and sae_weights.safetensors.
        scale: Given when the SAE is unfolded and expects activations times this; it is folded here.
        model_scale: c of the model that it was trained on: its c_s when it takes raw activations.
        device: Where to.

    Returns:
        The SAE, folded.

    Raises:
        StudyError: It cannot be read, or its configuration expects scaled activations and `scale` is not given.
    """
    sae = _load_from_disk(directory, device)
    normalization = sae.cfg.normalize_activations
    if normalization in PER_TOKEN_NORMALIZATION:
        if scale is not None:
            raise StudyError(
                f"external_saes.{name}.scale: {directory} normalizes every token itself ({normalization})",
                "remove scale",
            )
        factor = None
    elif scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
        factor = scale
    elif normalization == "expected_average_only_in":
        raise StudyError(
            f"external_saes.{name}: {directory} expects scaled activations (normalize_activations:"
            " expected_average_only_in), and the factor is not in its files",
            "give the factor that it was trained with: scale: 0.402",
        )
    else:
        factor = model_scale
    training = sae.cfg.metadata.get("training_architecture_details") or {}
    key = next((k for k in SPARSITY_KEYS if k in training), None)
    return StoredSAE(name, trained_on, sae, factor, key, training[key] if key else None)


def _load_from_disk(directory: Path, device: str) -> SAE[Any]:
    missing = [f for f in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / f).is_file()]
    if missing:
        raise StudyError(
            f"{directory}: not an SAE directory of SAELens: {' and '.join(missing)} not found",
            "name the directory that holds cfg.json and sae_weights.safetensors",
        )
    try:
        sae = SAE.load_from_disk(directory, device=device, dtype="float32")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise StudyError(
                f"{directory}: out of memory while the SAE was loaded ({first_line(error)})",
                "a device with more memory, or fewer SAEs in one study",
            ) from error
        raise StudyError(
            f"{directory}: the SAE cannot be loaded ({type(error).__name__}: {error})",
            "fetch or copy it again; a truncated file is the usual cause",
        ) from error
    broken = [name for name, tensor in sae.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise StudyError(
            f"{directory}: the SAE's {broken[0]} holds numbers that are not finite", "fetch or train it again"
        )
    return sae.eval().requires_grad_(False)


def check_fits(sae: StoredSAE, d_model: int, hook_name: str, directory: Path, *, accept_mismatch: bool = False) -> None:
    """Refuse an SAE of the wrong width, or one whose own record names another site.

    Args:
        sae: To be evaluated.
        d_model: Width of the study's site.
        hook_name: The study's site.
        directory: For the message.
        accept_mismatch: Take it whatever site it records.

    Raises:
        StudyError: It does not belong here.
    """
    if sae.sae.cfg.d_in != d_model:
        raise StudyError(
            f"{directory}: the SAE's d_in is {sae.sae.cfg.d_in}, the site {hook_name} has d_model {d_model}",
            "choose an SAE that was trained on a model of this pair",
        )
    recorded = sae.sae.cfg.metadata.get("hook_name")
    if not accept_mismatch and recorded is not None and same_site_name(recorded) != same_site_name(hook_name):
        raise StudyError(
            f"{directory}: the SAE was trained at {recorded}, the study's site is {hook_name}",
            "change site in the study file, or set accept_mismatch: true on this SAE",
        )


def same_site_name(hook_name: str) -> str:
    """One name for a site that has two: `blocks.{L-1}.hook_resid_post` is `blocks.{L}.hook_resid_pre`."""
    prefix, layer, hook = hook_name.split(".", 2) if hook_name.count(".") >= 2 else ("", "", hook_name)
    if hook == "hook_resid_post" and layer.isdigit():
        return f"{prefix}.{int(layer) + 1}.hook_resid_pre"
    return hook_name
