"""Scaled, shuffled activation batches: batch n is a function of (token set, seed, n).

Training positions are counted through, sequence after sequence. A block is a fixed number of batches of consecutive
positions; its sequences run once (one that straddles two blocks runs in both), and its activations are permuted by
(seed, block). So every position is used once, any batch can be reached by running one block, and the memory is that
of one block.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sae_transfer import signals
from sae_transfer.models.splice import Splicer

# Of float32 activations. Part of the result (it says how far tokens are mixed), so not a matter of the machine at hand.
BLOCK_BYTES = 2**31
SCALE_BATCH_TOKENS = 16_384


class ActivationStream:
    """Batches of one model's scaled activations at the site."""

    def __init__(
        self,
        splicer: Splicer,
        sequences: NDArray[np.integer],
        *,
        d_model: int,
        norm_scale: float,
        batch_size: int,
        n_batches: int,
        seed: int,
        drop_norm_above: float | None,
        device: str,
        positions: NDArray[np.bool_] | None = None,
    ) -> None:
        """Describe the stream; nothing runs before a batch is asked for.

        Args:
            splicer: The model cut at the site.
            sequences: Training token ids `[seq pos]`.
            d_model: Width of the site.
            norm_scale: c of the model; every batch is multiplied by it.
            batch_size: Activations a batch.
            n_batches: Batches in all; `n_batches * batch_size` positions must be there.
            seed: Of the shuffling.
            drop_norm_above: Leave out activations whose norm is above this multiple of their block's median norm, and
                take others of the block twice in their place; None keeps all.
            device: Where the model is and the batches come.
            positions: Which positions of `sequences` count, `[seq pos]`; None: all of them.
        """
        n_positions = sequences.size if positions is None else int(positions.sum())
        if n_batches * batch_size > n_positions:
            raise ValueError(f"{n_batches} batches of {batch_size} need more than {n_positions} positions")
        self.batch_size = batch_size
        self.n_batches = n_batches
        self._splicer = splicer
        self._sequences = sequences
        self._positions = None if positions is None else np.flatnonzero(positions)
        self._d_model = d_model
        self._norm_scale = norm_scale
        self._seed = seed
        self._drop_norm_above = drop_norm_above
        self._device = device
        self._batches_per_block = max(1, BLOCK_BYTES // (4 * d_model * batch_size))
        self._block_index = -1
        self._block: Float[Tensor, "tok d_model"] = torch.empty(0)
        self._order: Tensor = torch.empty(0)

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "tok d_model"]]:
        """Batches `start` to the last, in order."""
        return (self.batch(n) for n in range(start, self.n_batches))

    def batch(self, n: int) -> Float[Tensor, "tok d_model"]:
        """Batch n, float32, scaled."""
        index, within = divmod(n, self._batches_per_block)
        if index != self._block_index:
            self._load(index)
        chosen = self._order[within * self.batch_size : (within + 1) * self.batch_size]
        return self._block[chosen].float() * self._norm_scale

    @torch.inference_mode(False)
    def _load(self, index: int) -> None:
        """Run the sequences of a block and draw its order."""
        pos = self._sequences.shape[1]
        first = index * self._batches_per_block * self.batch_size
        last = min(first + self._batches_per_block * self.batch_size, self.n_batches * self.batch_size)
        # where the block's activations stand among all positions, padding included
        places = np.arange(first, last) if self._positions is None else self._positions[first:last]
        self._block, self._block_index = torch.empty(0), -1  # the old block's memory before the new one's
        block = torch.empty(last - first, self._d_model, dtype=self._splicer.head.weight.dtype, device=self._device)
        per_pass = max(1, SCALE_BATCH_TOKENS // pos)
        for row in range(places[0] // pos, places[-1] // pos + 1, per_pass):
            signals.check()  # a block can take minutes, more than a job has that is asked to stop
            acts = run_sequences(self._splicer, self._sequences[row : row + per_pass], self._device).flatten(0, 1)
            begin, end = np.searchsorted(places, [row * pos, (row + per_pass) * pos])
            block[begin:end] = acts[torch.from_numpy(places[begin:end] - row * pos).to(self._device)]
        generator = np.random.default_rng([self._seed, index])
        order = generator.permutation(len(block))
        if self._drop_norm_above is not None:
            norms = block.float().norm(dim=-1)
            kept = (norms <= self._drop_norm_above * norms.median()).cpu().numpy()[order]
            order = np.resize(order[kept], len(order))
        self._order = torch.from_numpy(order).to(self._device)
        self._block, self._block_index = block, index


def run_sequences(splicer: Splicer, sequences: NDArray[np.integer], device: str) -> Float[Tensor, "batch pos d_model"]:
    """Activations at the site of token ids `[seq pos]`, as one pass."""
    return splicer.run_to(torch.from_numpy(sequences.astype(np.int64)).to(device))


def measure_norm_scale(splicer: Splicer, sequences: NDArray[np.integer], d_model: int, device: str) -> float:
    """c = sqrt(d_model) / mean ||x|| over all positions of the sequences, BOS and outliers too.

    Norms in float32, their sum in float64 (Conerly et al., April 2024).
    """
    per_pass = max(1, SCALE_BATCH_TOKENS // sequences.shape[1])
    total = sum(
        run_sequences(splicer, sequences[row : row + per_pass], device).float().norm(dim=-1).double().sum().item()
        for row in range(0, len(sequences), per_pass)
    )
    return d_model**0.5 * sequences.size / total
