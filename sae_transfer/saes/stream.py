"""Scaled, shuffled activation batches: batch n is a function of (token set, seed, n).

Training positions are counted through, sequence after sequence. A block is a fixed number of batches of consecutive
positions; its sequences run once (one that straddles two blocks runs in both), and its activations are permuted by
(seed, block). So every position is used once, any batch can be reached by running one block, and the memory is that
of one block; of two where the next block is made while SAEs train on the present one.
"""

import mmap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae_transfer import signals
from sae_transfer.models.splice import Splicer
from sae_transfer.throughput import LANGUAGE_MODEL, SAE_STEP, Throughput

# Of float32 activations. Part of the result (it says how far tokens are mixed), so not a matter of the machine at hand.
BLOCK_BYTES = 2**31
SCALE_BATCH_TOKENS = 16_384  # of one pass of the model on a GPU
CPU_PASS_TOKENS = 2_048  # more than its caches hold is a sixth slower there, and three times the memory


class _Block(NamedTuple):
    acts: Float[Tensor, "tok d_model"]
    """Of consecutive positions, as the model gives them."""
    order: Int[Tensor, "tok"]
    """In which the batches take them."""


class ActivationStream:
    """Batches of one model's scaled activations at the site.

    Attributes:
        batch_size: Activations a batch.
        n_batches: Batches in all.
        throughput: What the language model took, and what whoever iterates over `batches` takes between two of them.
    """

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
        prefetches: bool = False,
        throughput: Throughput | None = None,
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
            prefetches: Make the next block, in a thread and on a CUDA stream of its own, while the present one is used.
            throughput: Where to count time; None: in one of its own.
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
        self._index = -1
        self._block: _Block | None = None
        self._is_cuda = torch.device(device).type == "cuda"
        self._thread = ThreadPoolExecutor(1, "activations") if prefetches else None
        # one for all blocks: memory that one CUDA stream gave back is not there for another
        self._side = torch.cuda.Stream(device) if prefetches and self._is_cuda else None
        self._ahead_index = -1
        self._ahead: Future[_Block] | None = None
        self.throughput = throughput or Throughput()

    def batches(self, start: int = 0) -> Iterator[Float[Tensor, "tok d_model"]]:
        """Batches `start` to the last, in order."""
        for n in range(start, self.n_batches):
            batch = self.batch(n)
            with self.throughput.timing(SAE_STEP, self.batch_size):
                yield batch
        self._finish_steps()

    def batch(self, n: int) -> Float[Tensor, "tok d_model"]:
        """Batch n, float32, scaled."""
        index, within = divmod(n, self._batches_per_block)
        if self._block is None or index != self._index:
            self._finish_steps()  # they read the old block, whose memory the next pass of the model will take
            self._block = None
            self._block, self._index = self._next_block(index), index
        chosen = self._block.order[within * self.batch_size : (within + 1) * self.batch_size]
        return self._block.acts[chosen].float().mul_(self._norm_scale)

    def _next_block(self, index: int) -> _Block:
        """A block, which may have been begun already; the one after it is begun."""
        if self._thread is None:
            return self._load(index)
        if self._ahead is None or self._ahead_index != index:
            self._ahead = self._thread.submit(self._load, index)
        block = self._ahead.result()
        self._ahead_index, self._ahead = index + 1, None
        if self._ahead_index * self._batches_per_block < self.n_batches:
            self._ahead = self._thread.submit(self._load, self._ahead_index)
        return block

    def close(self) -> None:
        """Give up the block that is being made ahead, and wait until it lets go of the model."""
        if self._ahead is not None:
            self._ahead.cancel()
            wait([self._ahead])
            self._ahead = None

    def _finish_steps(self) -> None:
        """Wait for what the user of the batches has queued on a GPU: once a block, which costs next to nothing."""
        with self.throughput.timing(SAE_STEP):
            self._synchronize()

    def _load(self, index: int) -> _Block:
        """Run the sequences of a block and draw its order."""
        first = index * self._batches_per_block * self.batch_size
        last = min(first + self._batches_per_block * self.batch_size, self.n_batches * self.batch_size)
        with (
            self.throughput.timing(LANGUAGE_MODEL, last - first),
            torch.inference_mode(False),
            torch.cuda.stream(self._side),
        ):
            # where the block's activations stand among all positions, padding included
            places = np.arange(first, last) if self._positions is None else self._positions[first:last]
            acts = self._run(places)
            order = np.random.default_rng([self._seed, index]).permutation(len(acts))
            if self._drop_norm_above is not None:
                norms = torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32)
                kept = (norms <= self._drop_norm_above * norms.median()).cpu().numpy()[order]
                order = np.resize(order[kept], len(order))
            block = _Block(acts, torch.from_numpy(order).to(self._device))
            self._synchronize()
            return block

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.current_stream(self._device).synchronize()

    def _run(self, places: NDArray[np.integer]) -> Float[Tensor, "tok d_model"]:
        """Activations at some places, counted over all positions of all sequences, ascending."""
        pos = self._sequences.shape[1]
        acts = torch.empty(len(places), self._d_model, dtype=self._splicer.head.weight.dtype, device=self._device)
        per_pass = rows_per_pass(pos, self._device)
        for row in range(places[0] // pos, places[-1] // pos + 1, per_pass):
            passed = run_sequences(self._splicer, self._sequences[row : row + per_pass], self._device).flatten(0, 1)
            begin, end = np.searchsorted(places, [row * pos, (row + per_pass) * pos])
            chosen = torch.from_numpy(places[begin:end] - row * pos).to(self._device)
            torch.index_select(passed, 0, chosen, out=acts[begin:end])
        if isinstance(self._sequences, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            # pages that were read count as this process's memory for as long as the mapping lasts
            self._sequences._mmap.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]
        return acts


def rows_per_pass(pos: int, device: str) -> int:
    """How many sequences of `pos` tokens the model reads at once."""
    return max(1, (CPU_PASS_TOKENS if device == "cpu" else SCALE_BATCH_TOKENS) // pos)


def run_sequences(splicer: Splicer, sequences: NDArray[np.integer], device: str) -> Float[Tensor, "batch pos d_model"]:
    """Activations at the site of token ids `[seq pos]`, as one pass.

    Raises:
        Stopped: Asked to stop: many passes can take minutes, more than a job has then.
    """
    signals.check()
    return splicer.run_to(torch.from_numpy(sequences.astype(np.int64)).to(device))


def measure_norm_scale(splicer: Splicer, sequences: NDArray[np.integer], d_model: int, device: str) -> float:
    """c = sqrt(d_model) / mean ||x|| over all positions of the sequences, BOS and outliers too.

    Norms in float32, their sum in float64 (Conerly et al., April 2024).
    """
    per_pass = rows_per_pass(sequences.shape[1], device)
    total = sum(
        run_sequences(splicer, sequences[row : row + per_pass], device).float().norm(dim=-1).double().sum().item()
        for row in range(0, len(sequences), per_pass)
    )
    return d_model**0.5 * sequences.size / total
