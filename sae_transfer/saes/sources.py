"""SAEs from elsewhere into our form: SAELens directory, SAELens release, hub repository, wandb artifact."""

import difflib
import json
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting, sae_lens_disk_loader
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors import SafetensorError
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

from sae_transfer.errors import StudyError, first_line
from sae_transfer.saes.store import CONFIG_FILE, SPARSITY_KEYS, WEIGHTS_FILE
from sae_transfer.study import file_digest, replacing, write_json
from sae_transfer.tracking import download_artifact

ORIGIN_FILE = "origin.json"
PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
# SAELens 6 drops the name of any other activation function without a word, and takes the SAE for a ReLU one.
KNOWN_ACTIVATIONS = (None, "relu", "topk")


def fetch(source: str, cache: Path, *, sae_id: str | None = None) -> Path:
    """Bring an SAE to this machine, in SAELens's current form, and not folded where it was not.

    A directory in that form is itself. Everything else is converted to float32 and written below `cache`, once: what
    is there already is not asked for again, so a run keeps its SAE when the hub's moves on.

    Args:
        source: A directory, a wandb artifact `entity/project/artifact:version`, a SAELens release (`RELEASE` with
            `sae_id`, or `RELEASE/ID`), or a hub repository `org/name` or `org/name/folder`.
        cache: A directory for converted SAEs, one subdirectory each.
        sae_id: SAE in the release, or folder of the hub repository.

    Returns:
        A directory with cfg.json and sae_weights.safetensors.

    Raises:
        StudyError: It cannot be had, or it is not an SAE that SAELens can read.
    """
    whole = source if sae_id is None else f"{source}/{sae_id}"
    if sae_id is None and Path(source).is_dir():
        found = _from_directory(Path(source), cache)
    elif sae_id is None and (source.startswith(("/", ".", "~")) or Path(source).exists()):
        raise StudyError(
            f"{source}: is not a directory", f"name the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    else:
        found = cache / re.sub(r"[^\w.-]+", "--", whole)
        if not _is_from(found, {"source": whole}):
            _write(_from_afar(source, sae_id), found, {"source": whole})
    architecture = str(_read_config(found, whole).get("architecture"))
    if "transcoder" in architecture:
        raise StudyError(
            f"{whole}: is a {architecture}, which reconstructs another site than it reads", "name an SAE of one site"
        )
    return found


def recorded_identity(cfg: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The model and the site that an SAE's configuration names.

    Args:
        cfg: Content of cfg.json, old or current form.

    Returns:
        model_name and hook_name, each None when the configuration does not say.
    """
    known = {**cfg, **(cfg.get("metadata") or {})}
    hook = known.get("hook_name") or known.get("hook_point")
    # The oldest configurations keep the layer apart: `blocks.{layer}.hook_resid_pre`.
    return known.get("model_name"), hook.replace("{layer}", str(known.get("hook_point_layer"))) if hook else None


def same_model(recorded: str, source: str, config_name: str | None = None) -> bool:
    """Whether an SAE's recorded model may be the study's; false only where both are known models and differ.

    Names are the same when they are equal ignoring case, or in their last path component, or when TransformerLens
    knows them as names of one model.

    Args:
        recorded: `model_name` of the SAE's configuration: mostly TransformerLens's name or a hub id.
        source: The study's model: a hub id, a directory, or `demo:base`, `demo:chat`.
        config_name: `_name_or_path` of the model's config.json. It is often left over from the model that this one was
            fine-tuned from, so a difference from it means nothing, and it counts only where `source` is a directory.

    Returns:
        False to refuse.
    """
    is_directory = Path(source).is_dir()
    names = [source, config_name] if is_directory and config_name else [source]
    if _official(recorded) in map(_official, names):
        return True
    return not (_is_known(recorded) and _is_known(source, is_directory=is_directory))


def _official(name: str) -> str:
    """The last component of the official name of a model, lower case; of an unknown one, its own."""
    last = name.lower().rstrip("/").rpartition("/")[2]
    names = _official_names()
    return names.get(name.lower(), names.get(last, last))


def _is_known(name: str, *, is_directory: bool = False) -> bool:
    """Whether a name surely means one model: TransformerLens knows it, or it has the form of a hub id."""
    last = name.lower().rstrip("/").rpartition("/")[2]
    is_hub_id = not is_directory and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return last in _official_names() or is_hub_id or name.startswith("demo:")


@cache
def _official_names() -> dict[str, str]:
    """Every name of a model that TransformerLens knows, lower case -> last component of the official one."""
    names = {}
    for official in OFFICIAL_MODEL_NAMES:
        last = official.lower().rpartition("/")[2]
        names |= {name.lower(): last for name in (official, last, *MODEL_ALIASES.get(official, []))}
    return names


def _from_directory(directory: Path, cache: Path) -> Path:
    """The directory itself when it is in the current form, else a converted copy."""
    _check_files(directory, str(directory))
    if not _is_old(_read_config(directory, str(directory))):
        return directory
    origin = {name: file_digest(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    origin["source"] = directory.resolve().name  # no path: a run directory can be moved
    target = cache / f"{directory.resolve().name}-{origin[WEIGHTS_FILE][:12]}"
    if not _is_from(target, origin):
        _write(_load(directory, str(directory)), target, origin)
    return target


def _from_afar(source: str, sae_id: str | None) -> SAE[Any]:
    """Load from wandb (`entity/project/artifact:version`), a SAELens release, or the hub."""
    if sae_id is None and re.fullmatch(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+", source):
        with tempfile.TemporaryDirectory() as scratch:
            download_artifact(source, Path(scratch))
            _check_files(Path(scratch), source)
            return _load(Path(scratch), source)
    releases = get_pretrained_saes_directory()
    release, _, rest = source.partition("/")
    if sae_id is None and release in releases:
        return _from_release(release, rest)
    if sae_id is not None and (source in releases or "/" not in source):
        return _from_release(source, sae_id)
    whole = source if sae_id is None else f"{source}/{sae_id}"
    return _load(_from_hub(whole), whole)


def _from_release(release: str, sae_id: str) -> SAE[Any]:
    releases = get_pretrained_saes_directory()
    if release not in releases:
        raise StudyError(f"{release}: SAELens knows no such release", _nearest(release, releases))
    if sae_id not in releases[release].saes_map:
        raise StudyError(
            f"{release}: this SAELens release has no SAE {sae_id!r}", _nearest(sae_id, releases[release].saes_map)
        )
    try:
        return SAE.from_pretrained(release, sae_id, device="cpu")
    except Exception as error:  # each release has a loader of its own, and each its errors
        raise StudyError(
            f"{release}/{sae_id}: not to be had from the hub or its local cache ({_brief(error)})",
            "check the network (HF_HUB_OFFLINE), and for a gated repository the login (`hf auth login`)",
        ) from error


def _nearest(asked: str, there: Mapping[str, Any]) -> str:
    names = difflib.get_close_matches(asked, there, n=3, cutoff=0.5) or list(there)[:3]
    return f"one of its {len(there)} names, for example {', '.join(names)}"


def _from_hub(source: str) -> Path:
    """A directory of the hub's cache with the two files of `org/name` or `org/name/folder`."""
    from huggingface_hub import snapshot_download

    organisation, name, *folders = [*source.strip("/").split("/"), ""]
    repository, folder = f"{organisation}/{name}", "/".join(folders).rstrip("/")
    wanted = [f"{folder}/{file}" if folder else file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        directory = Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # huggingface_hub raises many kinds, and all mean that the files are not to be had
        raise StudyError(
            f"{source}: is no directory, no SAELens release and no wandb artifact (entity/project/artifact:version),"
            f" and not to be had as a hub repository ({_brief(error)})",
            "check the name, the network (HF_HUB_OFFLINE), and for a gated repository the login (`hf auth login`)",
        ) from error
    if not all((directory / file).is_file() for file in wanted):
        _refuse(source, _hub_files(repository, folder, directory))
    return directory / folder


def _hub_files(repository: str, folder: str, directory: Path) -> list[str]:
    """What a hub folder holds, for a message: from the hub, else from the local cache."""
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(repository)
    except Exception:  # no network: the message says less
        files = _files_of(directory)
    prefix = f"{folder}/" if folder else ""
    return [file.removeprefix(prefix) for file in files if file.startswith(prefix)]


def _check_files(directory: Path, source: str) -> None:
    if not all((directory / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE)):
        _refuse(source, _files_of(directory))


def _files_of(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _refuse(source: str, files: list[str]) -> NoReturn:
    """Say what is there instead of an SAE."""
    inner = sorted({f.rpartition("/")[0] for f in files if f.endswith(f"/{WEIGHTS_FILE}")})
    pickled = [f for f in files if f.endswith(PICKLED)]
    if inner:
        shown = ", ".join(inner[:5]) + (", ..." if len(inner) > 5 else "")
        raise StudyError(f"{source}: holds its SAEs in folders: {shown}", f"name one: {source}/{inner[0]}")
    if pickled and WEIGHTS_FILE not in files:
        raise StudyError(
            f"{source}: its weights are pickled ({', '.join(pickled[:3])}), which can run anything and is never read",
            "convert them where you trust them: safetensors.torch.save_file(torch.load(FILE, weights_only=True),"
            f" '{WEIGHTS_FILE}'), beside a {CONFIG_FILE}",
        )
    shown = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
    raise StudyError(
        f"{source}: is not an SAE of SAELens ({CONFIG_FILE} and {WEIGHTS_FILE}); found: {shown or 'nothing'}",
        f"name what holds {CONFIG_FILE} and {WEIGHTS_FILE}",
    )


def _read_config(directory: Path, source: str) -> dict[str, Any]:
    try:
        cfg = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{source}: {CONFIG_FILE} cannot be read ({error})", "fetch or copy it again") from error
    if not isinstance(cfg, dict):
        raise StudyError(f"{source}: {CONFIG_FILE} is a {type(cfg).__name__}, not an object", "fetch or copy it again")
    return cfg


def _is_old(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration is from before SAELens 6, which put what describes the language model into `metadata`."""
    return "metadata" not in cfg


def _load(directory: Path, source: str) -> SAE[Any]:
    try:
        return SAE.load_from_disk(directory, device="cpu", dtype="float32", converter=_load_any_form)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StudyError(
            f"{source}: is not an SAE that SAELens can read ({_brief(error)})",
            "a truncated file is the usual cause: fetch or copy it again",
        ) from error


def _load_any_form(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """SAELens's loader, and for an old configuration its conversion with the gaps filled.

    Sizes and nulls are filled in (from the weights; with defaults), the layer is put into the hook's name, and the
    sparsity coefficient is kept where SAELens keeps that of SAEs trained today.
    """
    cfg, state = sae_lens_disk_loader(path, device, cfg_overrides)
    if "W_enc" not in state:
        raise ValueError(f"{WEIGHTS_FILE} holds {', '.join(sorted(state)[:5])}, and no W_enc")
    if not _is_old(cfg):
        return cfg, state
    activation = cfg.get("activation_fn_str", cfg.get("activation_fn"))
    if activation not in KNOWN_ACTIVATIONS:
        raise ValueError(f"its activation function is {activation}, which SAELens {sae_lens.__version__} has not")
    d_in, d_sae = state["W_enc"].shape
    model_name, hook_name = recorded_identity(cfg)
    given = {key: value for key, value in cfg.items() if value is not None}
    converted = handle_config_defaulting({**given, "d_in": d_in, "d_sae": d_sae})
    sparsity = {key: given[key] for key in SPARSITY_KEYS if key in given}
    converted["metadata"] = {
        **converted.get("metadata", {}),
        "model_name": model_name,
        "hook_name": hook_name,
        "training_architecture": converted["architecture"],
        "training_architecture_details": sparsity,
        "sae_lens_version": sae_lens.__version__,  # without it SAELens would convert a second time
    }
    return converted, state


def _is_from(directory: Path, origin: Mapping[str, str]) -> bool:
    """Whether a converted SAE is there, whole, and of this origin."""
    path = directory / ORIGIN_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == origin


def _write(sae: SAE[Any], directory: Path, origin: Mapping[str, str]) -> None:
    for parameter in sae.parameters():
        parameter.data = parameter.data.contiguous()  # safetensors refuses the transposed ones of some loaders
    with replacing(directory) as temporary:
        sae.save_model(temporary)
        write_json(temporary / ORIGIN_FILE, origin)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
