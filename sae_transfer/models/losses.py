"""Next-token losses of clean and spliced passes, in tiles of positions and vocabulary.

Axes: tok d_model d_vocab. Neither `[batch pos d_vocab]` nor a row of it exists: each tile of logits is reduced in place
to the running maximum and sum of a log-sum-exp, as attention kernels do, while it is still in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_transfer.models.splice import Head

# Positions and vocabulary of one tile of logits. On a CPU 2 MiB of float32, about a second-level cache: beyond
# it everything but the products takes twice as long, and products of fewer positions wait for the weights (measured,
# 128..1024 x 512..4096). A GPU wants few, large launches: 256 MiB.
TILE = {"cpu": (512, 1024), "cuda": (8192, 8192)}


@dataclass(frozen=True)
class CleanLosses:
    """Per position of the untouched pass: its loss, and what the spliced ones are compared with.

    Attributes:
        ce: Cross-entropy of the next token, nats, float64.
        hidden: Last hidden states.
        targets: Next tokens.
        best: The most likely token.
        log_total: log sum_v exp(z_v) over the logits z, float64.
        mean_row: The unembedding's mean row under the next-token distribution, sum_v p_v W_v. None with soft-capped
            logits, which are no linear function of the hidden state.
    """

    ce: Float[Tensor, "tok"]
    hidden: Float[Tensor, "tok d_model"]
    targets: Int[Tensor, "tok"]
    best: Int[Tensor, "tok"]
    log_total: Float[Tensor, "tok"]
    mean_row: Float[Tensor, "tok d_model"] | None


class SplicedLosses(NamedTuple):
    """Per position, `[tok]`, float64, of one spliced pass.

    Attributes:
        ce: Cross-entropy of the next token, nats.
        kl: KL(clean || spliced) of the next-token distributions, nats.
        agrees: 1.0 where the clean pass's most likely token is the most likely one.
    """

    ce: Float[Tensor, "tok"]
    kl: Float[Tensor, "tok"]
    agrees: Float[Tensor, "tok"]


@torch.inference_mode()
def clean_losses(head: Head, hidden: Float[Tensor, "tok d_model"], targets: Int[Tensor, "tok"]) -> CleanLosses:
    """Cross-entropy of the clean pass, and what `spliced_losses` needs of it.

    Args:
        head: The model's unembedding.
        hidden: Last hidden states, after the final norm.
        targets: Next tokens.

    Returns:
        Per position.
    """
    n, device = len(targets), hidden.device
    ce, log_total = (torch.empty(n, dtype=torch.float64, device=device) for _ in range(2))
    best = torch.empty(n, dtype=torch.long, device=device)
    mean_row = torch.empty(hidden.shape, device=device) if head.softcap is None else None
    for at in _slices(n, _tile(device)[0]):
        total = _LogSumExp(hidden[at], with_mean_row=mean_row is not None)
        target = torch.empty(len(total.largest), 1, device=device)
        for tokens in _slices(head.d_vocab, _tile(device)[1]):
            logits = head.logits(hidden[at], tokens)
            _pick(logits, tokens, targets[at, None], target)
            top, index = logits.max(-1, keepdim=True)
            best[at] = torch.where(top > total.largest, index + tokens.start, best[at, None])[:, 0]
            total.add(logits, top, head.weight[tokens])
        log_total[at] = total.log()
        ce[at] = log_total[at] - target[:, 0]
        if mean_row is not None:
            mean_row[at] = total.mean_row()
    return CleanLosses(ce, hidden, targets, best, log_total, mean_row)


@torch.inference_mode()
def spliced_losses(head: Head, clean: CleanLosses, hidden: Float[Tensor, "tok d_model"]) -> SplicedLosses:
    """Cross-entropy, KL and agreement of a spliced pass.

    KL(clean || spliced) = sum_v p_v (z_v - y_v) - log sum_v exp(z_v) + log sum_v exp(y_v), with clean logits z, their
    distribution p and spliced logits y. The first term is (h - h').(sum_v p_v W_v) for hidden states h and h', one
    product of two vectors; it all but cancels against the others where the passes are close, hence float64.

    Args:
        head: The model's unembedding.
        clean: Of the same positions.
        hidden: Last hidden states of the spliced pass, after the final norm.

    Returns:
        Per position.
    """
    n, device = len(hidden), hidden.device
    losses = SplicedLosses(*(torch.empty(n, dtype=torch.float64, device=device) for _ in range(3)))
    wanted = torch.stack([clean.targets, clean.best], 1)
    for at in _slices(n, _tile(device)[0]):
        total = _LogSumExp(hidden[at])
        picked = torch.empty(wanted[at].shape, device=device)  # logits of the targets and of the clean pass's best
        lost = torch.zeros_like(clean.log_total[at])  # sum_v p_v (z_v - y_v)
        if clean.mean_row is not None:
            moved = clean.hidden[at].double() - hidden[at].double()
            lost += moved.mul_(clean.mean_row[at]).sum(-1)
        for tokens in _slices(head.d_vocab, _tile(device)[1]):
            logits = head.logits(hidden[at], tokens)
            if clean.mean_row is None:
                lost += _expected_difference(head.logits(clean.hidden[at], tokens), logits, clean.log_total[at])
            _pick(logits, tokens, wanted[at], picked)
            total.add(logits, logits.amax(-1, keepdim=True))
        log_total = total.log()
        losses.ce[at] = log_total - picked[:, 0]
        losses.kl[at] = lost - clean.log_total[at] + log_total
        losses.agrees[at] = (picked[:, 1] >= total.largest[:, 0]).double()
    return losses


@torch.inference_mode()
def surprisals(head: Head, hidden: Float[Tensor, "d_model"]) -> Float[Tensor, "d_vocab"]:
    """-log p of every token, nats, after one hidden state, in float64.

    Args:
        head: The model's unembedding.
        hidden: After the final norm.
    """
    state = hidden.double()[None]
    tiles = [head.logits(state, tokens)[0] for tokens in _slices(head.d_vocab, _tile(hidden.device)[1])]
    return -torch.cat(tiles).log_softmax(-1)


class _LogSumExp:
    """Over tiles of the vocabulary: the largest logit so far, and sums of exp(logit - largest)."""

    def __init__(self, hidden: Float[Tensor, "tok d_model"], *, with_mean_row: bool = False) -> None:
        self.largest = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        self._total = torch.zeros(len(hidden), 1, dtype=torch.float64, device=hidden.device)
        self._rows = torch.zeros(hidden.shape, device=hidden.device) if with_mean_row else None

    def add(
        self, logits: Float[Tensor, "tok d_vocab"], top: Float[Tensor, "tok 1"], weight: Tensor | None = None
    ) -> None:
        """Take in one tile, which is overwritten; `top` is its largest logit of each position."""
        largest = torch.maximum(self.largest, top)
        shrink = (self.largest - largest).exp_()
        self.largest = largest
        weights = logits.sub_(largest).exp_()
        self._total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        if self._rows is not None and weight is not None:
            self._rows.mul_(shrink).addmm_(weights, weight.float())

    def log(self) -> Float[Tensor, "tok"]:
        return (self._total.log() + self.largest)[:, 0]

    def mean_row(self) -> Float[Tensor, "tok d_model"]:
        assert self._rows is not None
        return self._rows / self._total


def _pick(
    logits: Float[Tensor, "tok tile"], tokens: slice, wanted: Int[Tensor, "tok n"], picked: Float[Tensor, "tok n"]
) -> None:
    """Write the logits of the wanted tokens that lie in this tile."""
    index = wanted - tokens.start
    is_here = (index >= 0) & (index < logits.shape[-1])
    torch.where(is_here, logits.gather(-1, index.clamp_(0, logits.shape[-1] - 1)), picked, out=picked)


def _expected_difference(
    clean: Float[Tensor, "tok tile"], spliced: Float[Tensor, "tok tile"], log_total: Float[Tensor, "tok"]
) -> Float[Tensor, "tok"]:
    """This tile's part of sum_v p_v (z_v - y_v)."""
    p = (clean - log_total[:, None].float()).exp_()
    return (clean - spliced).mul_(p).sum(-1, dtype=torch.float64)


def _tile(device: torch.device) -> tuple[int, int]:
    return TILE[device.type]


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
