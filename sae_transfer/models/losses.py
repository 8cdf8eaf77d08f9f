"""Next-token losses of clean and spliced passes, streamed over positions so that `[batch pos d_vocab]` never exists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_transfer.models.splice import Head

# Values of one slice of logits, 8 MiB in float32: larger ones leave the caches and are slower. But fewer positions than
# this make the product with the unembedding wait for its weights.
LOGITS_AT_ONCE, MIN_POSITIONS = 2**21, 128


class SplicedLosses(NamedTuple):
    """Per position, `[tok]`, of one spliced pass.

    Attributes:
        ce: Cross-entropy of the next token, nats.
        kl: KL(clean || spliced) of the next-token distributions, nats.
        agrees: 1.0 where both have the same most likely token.
    """

    ce: Float[Tensor, "tok"]
    kl: Float[Tensor, "tok"]
    agrees: Float[Tensor, "tok"]


@torch.inference_mode()
def next_token_losses(
    head: Head,
    targets: Int[Tensor, "tok"],
    clean: Float[Tensor, "tok d_model"],
    spliced: Sequence[Float[Tensor, "tok d_model"]],
) -> tuple[Float[Tensor, "tok"], list[SplicedLosses]]:
    """Cross-entropy of the clean pass, and cross-entropy, KL and agreement of each spliced one.

    Args:
        head: The model's unembedding.
        targets: Next tokens.
        clean: Last hidden states of the untouched pass.
        spliced: The same of each spliced pass.

    Returns:
        Clean cross-entropy in nats `[tok]`, and one `SplicedLosses` for each of `spliced`.
    """
    ce_clean = torch.empty(len(targets), device=clean.device)
    results = [SplicedLosses(*(torch.empty(len(targets), device=clean.device) for _ in range(3))) for _ in spliced]
    step = max(MIN_POSITIONS, LOGITS_AT_ONCE // head.weight.shape[0])
    for start in range(0, len(targets), step):
        at = slice(start, start + step)
        target = targets[at, None]
        log_p = head.logits(clean[at]).log_softmax(-1)
        ce_clean[at] = -log_p.gather(-1, target)[:, 0]
        p, best = log_p.exp(), log_p.argmax(-1)
        for hidden, result in zip(spliced, results, strict=True):
            log_q = head.logits(hidden[at]).log_softmax(-1)
            result.ce[at] = -log_q.gather(-1, target)[:, 0]
            result.agrees[at] = (log_q.argmax(-1) == best).float()
            result.kl[at] = (log_p - log_q).mul_(p).sum(-1)
    return ce_clean, results
