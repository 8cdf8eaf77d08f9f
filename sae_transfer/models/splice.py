"""Run a model up to the site, and on from an edited residual. Two implementations of one small interface.

Axes: batch pos d_model d_vocab. `LayerSplicer` runs Hugging Face's own decoder layers and restarts at a residual-stream
site; `BridgeSplicer` is TransformerLens's reference, which knows every hook point and needs a whole pass for each edit.
`open_splicer` picks: the first where it exists and gives what the second gives.
"""

import copy
import gc
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_transfer.errors import StudyError
from sae_transfer.models.pair import Checkpoint, layers_to, parse_hook

logger = logging.getLogger(__name__)

END_OF_LAYERS = "ln_final.hook_in"  # TransformerLens's hook point
# Relative to the largest value compared; float32 rounding through a few layers is a tenth of this.
AGREEMENT_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}


class Splicer(Protocol):
    """A language model cut at a site.

    Attributes:
        restarts: Whether `run_on` starts at the site, so that only the layers above it run.
        is_residual: Whether everything above the site sees only what passes through it (a residual-stream site).
        head: From the last hidden states to next-token quantities.
        difference: How far the restart is from TransformerLens, as `disagreement` says it, also where it was too far
            and is not used; None where there is none to compare.
    """

    restarts: bool
    is_residual: bool
    head: "Head"
    difference: float | None

    def run_to(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The activations at the site."""
        ...

    def run_on(
        self, tokens: Int[Tensor, "batch pos"], acts: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The last hidden states, after the final norm, when `acts` stand at the site."""
        ...


class Head:
    """Unembedding: last hidden states to logits, a slice of the vocabulary at a time."""

    def __init__(self, model: Any) -> None:
        """Take the unembedding of a Hugging Face model.

        Args:
            model: A causal language model.
        """
        output = model.get_output_embeddings()
        self.weight: Float[Tensor, "d_vocab d_model"] = output.weight
        self.bias: Float[Tensor, "d_vocab"] | None = output.bias  # noqa: UP037
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @property
    def d_vocab(self) -> int:
        """Number of logits."""
        return self.weight.shape[0]

    def logits(self, hidden: Float[Tensor, "tok d_model"], tokens: slice = slice(None)) -> Float[Tensor, "tok d_vocab"]:
        """Logits in the precision of the hidden states, at least float32; a new tensor.

        Args:
            hidden: Last hidden states, after the final norm.
            tokens: Of the vocabulary, which logits.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias[tokens].to(dtype)
        logits = nn.functional.linear(hidden.to(dtype), self.weight[tokens].to(dtype), bias)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


class LayerSplicer:
    """Restart over Hugging Face decoder layers, for residual-stream sites.

    The model is shown twice through shallow copies that share every weight: `lower` has the layers below the site and
    no final norm; in `upper` the layers below pass their input through, and the first module above takes the edited
    residual. The model's own forward makes masks, positions and sliding windows, so nothing of an architecture is
    written down here but the names of its layer list and final norm.
    """

    restarts = True
    is_residual = True
    difference: float | None = None

    def __init__(self, model: Any, layer: int) -> None:
        """Cut a model.

        Args:
            model: A Hugging Face causal language model.
            layer: Decoder layer whose input is the site; the number of layers means the input of the final norm.

        Raises:
            AttributeError: The model does not have the form this class knows.
        """
        decoder = model.base_model
        layers_name = next(name for name in ("layers", "h") if hasattr(decoder, name))
        norm_name = next(name for name in ("norm", "final_layer_norm", "ln_f") if hasattr(decoder, name))
        layers, norm = list(getattr(decoder, layers_name)), getattr(decoder, norm_name)
        self.head = Head(model)
        self._lower = _view(decoder, {layers_name: nn.ModuleList(layers[:layer]), norm_name: nn.Identity()})
        above = [*layers[layer:], norm]
        self._entry = _Entry(above[0])
        above[0] = self._entry
        self._upper = _view(
            decoder,
            {layers_name: nn.ModuleList([*(_Pass() for _ in layers[:layer]), *above[:-1]]), norm_name: above[-1]},
        )

    @torch.inference_mode()
    def run_to(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """See `Splicer.run_to`; layers above the site do not run."""
        return self._lower(input_ids=tokens, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def run_on(
        self, tokens: Int[Tensor, "batch pos"], acts: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """See `Splicer.run_on`; layers below the site do not run, and `tokens` are not looked at."""
        self._entry.residual = acts = acts.to(self.head.weight.dtype)
        try:
            return self._upper(inputs_embeds=acts, use_cache=False).last_hidden_state
        finally:
            self._entry.residual = None


def _view(module: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of a module with some children replaced; weights are shared, the original is untouched."""
    view = copy.copy(module)
    view._modules = {**module._modules, **replaced}
    return view


class _Pass(nn.Module):
    """Stands for a layer below the site: hands its input on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Entry(nn.Module):
    """Stands for the first module above the site: runs it on the edited residual, whatever came from below."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.residual: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.residual is not None
        return self.module(self.residual, *args, **kwargs)


class BridgeSplicer:
    """TransformerLens's `TransformerBridge`: every hook point, one whole pass for each edit."""

    restarts = False
    difference: float | None = None

    def __init__(self, model: Any, hook_name: str, directory: Path) -> None:
        """Wrap a Hugging Face model and see whether the hook point exists.

        Args:
            model: A causal language model; its weights are shared, its modules left as they are.
            hook_name: For example `blocks.13.hook_attn_out`.
            directory: The model's checkpoint, of which the bridge reads the configuration.

        Raises:
            StudyError: TransformerLens does not know the architecture, or it has no such hook point.
        """
        from transformer_lens.model_bridge import TransformerBridge

        self.head = Head(model)
        self.is_residual = "resid" in hook_name or hook_name == END_OF_LAYERS
        self._hook_name = hook_name
        # The bridge rebuilds the modules that it is given: it gets a copy of them around the same weights.
        weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, dict(weights))
        try:
            self._bridge: Any = TransformerBridge.boot_transformers(
                str(directory),
                hf_model=twin,
                tokenizer=_stand_in_tokenizer(),
                device=model.device,
                dtype=model.dtype,
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise StudyError(
                f"{directory}: TransformerLens has no adapter for {type(model).__name__} ({error})",
                "choose a pair whose architecture TransformerLens knows",
            ) from error
        # a hook that an architecture lacks never fires, without a word (parallel blocks have no resid_mid)
        if self._capture(torch.zeros(1, 2, dtype=torch.long, device=model.device)) is None:
            raise StudyError(
                f"site.hook: {type(model).__name__} has no {hook_name}",
                "choose another site.hook; resid_pre exists in every architecture",
            )

    def _capture(self, tokens: Int[Tensor, "batch pos"]) -> Tensor | None:
        """The activations at the site; nothing above it runs. None where the hook never fires."""
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        seen: list[Tensor] = []

        def take(acts: Tensor, hook: Any) -> None:
            seen.append(acts)
            raise StopAtLayerException(acts)  # which `run_with_hooks` takes for the end of the pass

        with torch.inference_mode():
            self._bridge.run_with_hooks(tokens, fwd_hooks=[(self._hook_name, take)])
        return seen[0] if seen else None

    def run_to(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """See `Splicer.run_to`."""
        acts = self._capture(tokens)
        assert acts is not None
        return acts

    def run_on(
        self, tokens: Int[Tensor, "batch pos"], acts: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """See `Splicer.run_on`."""
        last: list[Tensor] = []
        acts = acts.to(self.head.weight.dtype)
        hooks = [
            *self._edit(acts),
            ("unembed.hook_in", lambda hidden, hook: last.append(hidden.clone())),
        ]
        with torch.inference_mode():
            self._bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        return last[0]

    def _edit(self, acts: Float[Tensor, "batch pos d_model"]) -> list[tuple[str, Any]]:
        """Hooks that put `acts` at the site."""
        block, _, point = self._hook_name.rpartition(".")
        if point != "hook_resid_mid":
            return [(self._hook_name, lambda _, hook: acts)]
        # What a hook returns at resid_mid reaches the MLP alone, and the residual goes past it (transformer_lens 3.9);
        # so it is made the sum of nothing and the attention's output, which loses no digit.
        return [
            (f"{block}.hook_resid_pre", lambda resid_pre, hook: torch.zeros_like(resid_pre)),
            (f"{block}.hook_attn_out", lambda _, hook: acts),
        ]


def _stand_in_tokenizer() -> Any:
    """For the bridge, which wants a tokenizer though tokens come ready; a checkpoint may have none."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def open_splicer(model: Any, hook_name: str, checkpoint: Checkpoint) -> Splicer:
    """Choose how a model is cut at a site.

    A residual-stream site gets the restart when it agrees with TransformerLens on a few tokens, both up to the site and
    on from an edited residual; else, and for every other hook point, whole passes of TransformerLens.

    Args:
        model: A loaded Hugging Face causal language model; it may lack the layers above the site, and is then good for
            `run_to` alone.
        hook_name: For example `blocks.13.hook_resid_pre`.
        checkpoint: Where it was loaded from.

    Returns:
        The splicer, which says how far the two are from each other.

    Raises:
        StudyError: The layer is beyond the model, the architecture lacks the hook point, or its logits are not those of
            `Head`.
    """
    _refuse_other_logits(model, checkpoint)
    layers = layers_to(hook_name, checkpoint.n_layers)
    layer, kind = parse_hook(hook_name, checkpoint.n_layers)
    is_cut_off = layer == model.config.get_text_config().num_hidden_layers  # no layer left that would have the hook
    reference = BridgeSplicer(model, END_OF_LAYERS if is_cut_off else hook_name, checkpoint.directory)
    if kind not in ("resid_pre", "resid_post"):
        logger.info("%s: whole passes of TransformerLens give %s", checkpoint.source, hook_name)
        return reference
    try:
        fast = LayerSplicer(model, layers)
        fast.difference = reference.difference = disagreement(fast, reference, model)
    except (AttributeError, StopIteration, TypeError) as error:
        logger.warning("%s: no restart for %s (%s); whole passes", checkpoint.source, type(model).__name__, error)
        return reference
    if not fast.difference <= AGREEMENT_TOLERANCE[model.dtype]:
        logger.warning(
            "%s: restarting at %s differs from TransformerLens by %.1e (relative); whole passes instead",
            checkpoint.source,
            hook_name,
            fast.difference,
        )
        return reference
    logger.info("%s: restart agrees with TransformerLens to %.1e (relative)", checkpoint.source, fast.difference)
    del reference
    gc.collect()  # its modules refer to each other, and some architectures' copies of weights hang on them
    return fast


@torch.inference_mode()
def _refuse_other_logits(model: Any, checkpoint: Checkpoint) -> None:
    """Refuse a model that does more to its logits than `Head` does: some architectures scale them."""
    tokens = _fixed_tokens(model)
    ours = Head(model).logits(model.base_model(tokens).last_hidden_state)
    theirs = model(tokens).logits.float()
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= AGREEMENT_TOLERANCE[model.dtype]:
        raise StudyError(
            f"{checkpoint.source}: logits of {type(model).__name__} are not the unembedding of its last hidden states"
            f" (they differ by {difference:.1e}, relative), so that losses would be wrong",
            "a model of an architecture that the README lists",
        )


def _fixed_tokens(model: Any) -> Int[Tensor, "2 16"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (2, 16), generator=generator).to(model.device)


@torch.inference_mode()
def disagreement(fast: Splicer, reference: Splicer, model: Any) -> float:
    """Largest difference of two splicers on 2 x 16 fixed tokens, relative to the largest value; a fraction.

    Compares the activations at the site, and the logits after an edit of them.
    """
    tokens = _fixed_tokens(model)
    theirs = reference.run_to(tokens)
    edited = theirs.flip(1) * 0.5  # far from anything the layers below would give
    pairs = [
        (fast.run_to(tokens), theirs),
        *(
            (fast.head.logits(fast.run_on(tokens, acts)[0]), reference.head.logits(reference.run_on(tokens, acts)[0]))
            for acts in (theirs, edited)
        ),
    ]
    differences = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    return torch.stack(differences).max().item()  # which is NaN when one of them is
