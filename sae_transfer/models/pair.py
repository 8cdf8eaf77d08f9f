"""Resolve and load one side of the pair; say whether the two sides agree."""

import gc
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_transfer import demo
from sae_transfer.errors import StudyError, first_line, is_out_of_memory
from sae_transfer.study import digest, sampled_digest

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Differences in these leave the residual stream comparable: they are noted, never refused.
NOTED_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Checkpoint:
    """One side of the pair on disk.

    Attributes:
        source: What the study file names.
        directory: Where its files are.
        revision: The hub commit it was taken at; None for a local directory.
        config: The content of its config.json.
    """

    source: str
    directory: Path
    revision: str | None
    config: dict[str, Any]

    @property
    def model_class(self) -> str:
        """The Hugging Face class, for example `LlamaForCausalLM`."""
        return (self.config.get("architectures") or [str(self.config.get("model_type"))])[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.get("hidden_size") or self.config["n_embd"])

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.get("num_hidden_layers") or self.config["n_layer"])


def resolve(source: str, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Find a checkpoint: `demo:base` or `demo:chat`, a directory whatever it is called, else a hub id.

    Args:
        source: As in the study file.
        revision: Branch, tag or commit of a hub id.
        weights: Whether the weights are wanted too; without them a hub id brings only its small files.

    Returns:
        The checkpoint, its config.json read, its weights not.

    Raises:
        StudyError: Nothing is there, or it is not a Hugging Face checkpoint with safetensors.
    """
    if source.startswith("demo:"):
        if source.removeprefix("demo:") not in demo.SIDES:
            raise StudyError(f"{source}: the embedded models are demo:base and demo:chat")
        directory, commit = demo.model_dir(source.removeprefix("demo:")), None
    elif Path(source).is_dir():
        directory, commit = Path(source), None
    else:
        directory = _from_hub(source, revision, weights)
        commit = directory.name if directory.parent.name == "snapshots" else None
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{source}: no readable config.json in {directory} ({error})",
            "name a directory that `save_pretrained` wrote, or a hub id",
        ) from error
    if not isinstance(config, dict) or not {"hidden_size", "n_embd"} & config.keys():
        raise StudyError(
            f"{source}: the config.json in {directory} is not that of a decoder language model (it has no hidden_size)",
            "name a directory that `save_pretrained` wrote, or a hub id",
        )
    if weights and not any(directory.glob("*.safetensors")):
        raise StudyError(
            f"{source}: no .safetensors file in {directory}",
            "convert the checkpoint with `save_pretrained(..., safe_serialization=True)`; pickled weights are not read",
        )
    return Checkpoint(source, directory, commit, config)


def _from_hub(source: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = WANTED_FILES if weights else [p for p in WANTED_FILES if p != "*.safetensors"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise StudyError(
            f"{source}: is neither a directory nor a hub id", "check the path; relative ones start at the study file"
        ) from error
    except Exception as error:  # huggingface_hub raises many kinds, and all mean that the files are not to be had
        at = f" at revision {revision}" if revision else ""
        raise StudyError(
            f"{source}{at}: not a directory, and not to be had from the hub or its local cache"
            f" ({type(error).__name__}: {first_line(error)})",
            "check the name, the network (HF_HUB_OFFLINE), and for a gated model the login (`hf auth login`)",
        ) from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sha256 (hex) that tells whether a checkpoint's numbers changed: of its configuration and its weight files."""
    files = {path.name: sampled_digest(path) for path in sorted(checkpoint.directory.glob("*.safetensors"))}
    return digest([checkpoint.config, files])


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint comes with one; token ids that are given can do without."""
    return any((checkpoint.directory / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of one side (a `PreTrainedTokenizerBase`).

    Raises:
        StudyError: The checkpoint has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.directory)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise StudyError(
            f"{checkpoint.source}: its tokenizer cannot be read ({type(error).__name__}: {error})",
            "put tokenizer.json and tokenizer_config.json beside config.json",
        ) from error


def check_agreement(base: Checkpoint, chat: Checkpoint) -> list[str]:
    """Refuse two checkpoints whose activations cannot be compared; list the differences that leave them comparable.

    Args:
        base: The base side.
        chat: The chat side.

    Returns:
        One sentence a difference worth knowing, for the manifest and one warning.

    Raises:
        StudyError: Model class, d_model, number of layers, or the meaning of a token id differ.
    """
    conflicts = [
        f"{label}: {ours!r} against {theirs!r}"
        for label, ours, theirs in (
            ("model class", base.model_class, chat.model_class),
            ("d_model", base.d_model, chat.d_model),
            ("number of layers", base.n_layers, chat.n_layers),
        )
        if ours != theirs
    ]
    without = [side.source for side in (base, chat) if not has_tokenizer(side)]
    ours, theirs = (None, None) if without else (load_tokenizer(base), load_tokenizer(chat))
    tokens, others = ({i: t for t, i in tok.get_vocab().items()} if tok else {} for tok in (ours, theirs))
    clashing = sorted(i for i in tokens.keys() & others.keys() if tokens[i] != others[i])
    if clashing:
        shown = ", ".join(f"{i} is {tokens[i]!r} and {others[i]!r}" for i in clashing[:3])
        conflicts.append(f"{len(clashing)} token ids mean different tokens (id {shown})")
    if conflicts:
        raise StudyError(
            f"pair: {base.source} and {chat.source} do not agree\n    " + "\n    ".join(conflicts),
            "name a chat model that was fine-tuned from this base model",
        )
    notes = [
        f"{field}: base {base.config.get(field)!r}, chat {chat.config.get(field)!r}"
        for field in NOTED_FIELDS
        if base.config.get(field) != chat.config.get(field)
    ]
    if ours is None or theirs is None:
        return [*notes, f"tokenizers: {' and '.join(without)} has none, so what the ids mean was not compared"]
    for role in ("bos_token", "eos_token", "pad_token"):
        if getattr(ours, role) != getattr(theirs, role):
            notes.append(f"{role}: base {getattr(ours, role)!r}, chat {getattr(theirs, role)!r}")
    if len(tokens) != len(others):
        notes.append(f"tokens in the vocabulary: base {len(tokens)}, chat {len(others)}")
    if ours.chat_template != theirs.chat_template:
        notes.append("chat template: differs" if ours.chat_template else "chat template: only the chat side has one")
    return notes


def parse_hook(hook_name: str, n_layers: int) -> tuple[int, str]:
    """Split `blocks.13.hook_resid_pre` into (13, "resid_pre").

    Raises:
        StudyError: The layer is beyond the model.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook_name)
    assert match, hook_name
    layer = int(match[1])
    if layer >= n_layers:
        raise StudyError(
            f"site.layer: {layer} is beyond the model, whose layers are 0 to {n_layers - 1}", "lower site.layer"
        )
    return layer, match[2]


def layers_to(hook_name: str, n_layers: int) -> int:
    """How many decoder layers run before the site is reached; a model of so many has the site as its last value.

    Raises:
        StudyError: The layer is beyond the model.
    """
    layer, kind = parse_hook(hook_name, n_layers)
    return layer if kind == "resid_pre" else layer + 1


def resolve_pair(
    sources: tuple[str, str], revisions: tuple[str | None, str | None], hook_name: str, *, weights: bool = True
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Find both models, and refuse a pair that does not agree or lacks the site's layer.

    Args:
        sources: Of base and chat, as in the study file.
        revisions: Of both.
        hook_name: The site.
        weights: Whether the weights are wanted on disk too.

    Returns:
        `base` and `chat`, and the differences that leave activations comparable.

    Raises:
        StudyError: Something does not fit.
    """
    base, chat = (resolve(*side, weights=weights) for side in zip(sources, revisions, strict=True))
    notes = check_agreement(base, chat)
    parse_hook(hook_name, base.n_layers)
    return {"base": base, "chat": chat}, notes


def load_model(checkpoint: Checkpoint, *, dtype: str, device: str, layers: int | None = None) -> Any:
    """Load one side as a Hugging Face causal language model, without any weight processing.

    Args:
        checkpoint: Where it is.
        dtype: `float32` or `bfloat16`.
        device: A torch device.
        layers: Take only so many decoder layers, from the first; the weights of the others are not read, and the
            logits of such a model mean nothing. None takes all.

    Returns:
        The `PreTrainedModel`, in eval mode, its parameters frozen, attention by SDPA where the class has it.

    Raises:
        StudyError: A weight file is damaged, weights are missing or of the wrong shape, or memory ran out.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from sae_transfer.models.attention import repeat_keys

    gc.collect()  # an earlier model, whose modules may refer to each other, before the new one's weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    transformers_logging.disable_progress_bar()  # ours is drawn instead
    verbosity = transformers_logging.get_verbosity()
    try:
        # it reports keys that are left over or missing: the first are meant, the second are refused below
        transformers_logging.set_verbosity_error()
        config: Any = AutoConfig.from_pretrained(checkpoint.directory)
        if layers is not None:
            _cut(config.get_text_config(), layers)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise StudyError(
                f"{checkpoint.source}: out of memory while it was loaded ({first_line(error)})",
                "a machine with more memory (sae-transfer check CONFIG says how much), or pair.dtype: bfloat16",
            ) from error
        raise StudyError(
            f"{checkpoint.source}: cannot be loaded from {checkpoint.directory} ({type(error).__name__}: {error})",
            "a truncated file is the usual cause: fetch or copy the checkpoint again",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = loaded
    # transformers fills what is missing with random numbers and only warns
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise StudyError(
            f"{checkpoint.source}: {len(absent)} weights are missing or of the wrong shape, the first is {absent[0]}",
            "fetch or copy the checkpoint again",
        )
    model = model.to(device).eval().requires_grad_(False)
    if dtype == "float32" and model.device.type == "cuda":
        repeat_keys(model)
    return model


def _cut(config: Any, layers: int) -> None:
    """Make a model's configuration one of fewer layers, and so its lists that say something of each layer."""
    n_layers = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == n_layers and name.endswith(("layers", "types")):
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
