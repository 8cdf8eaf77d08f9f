"""How much runs at once, and what happens when memory runs out."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sae_transfer import signals
from sae_transfer.errors import StudyError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)


MIN_POSITIONS = 256  # a product of fewer waits for the SAE's weights: measured half the rate at 128


@dataclass(frozen=True)
class AtOnce:
    """How much is in memory at once; changes no number.

    Attributes:
        tokens: Positions of one pass of a model, those of all its sequences together.
        features: Values of one slice `[tok d_sae]` of an SAE's features.
    """

    tokens: int
    features: int

    def positions(self, d_sae: int) -> int:
        """Positions of one slice of an SAE of this width."""
        return max(MIN_POSITIONS, self.features // d_sae)

    @property
    def half(self) -> "AtOnce":
        """Half of each."""
        return AtOnce(max(1, self.tokens // 2), max(1, self.features // 2))


# On a CPU what the caches hold: larger passes are slower (measured), and hold more memory. A GPU's products are at
# their full rate from a few thousand positions on; its memory is mostly the weights'.
AT_ONCE = {"cpu": AtOnce(tokens=2**10, features=2**20), "cuda": AtOnce(tokens=2**14, features=2**26)}


def in_passes(
    run: Callable[[slice, AtOnce], None],
    n_sequences: int,
    n_positions: int,
    *,
    batch_size: int,
    device: str,
    progress: Callable[[int], None],
) -> None:
    """Run a few sequences at a time; when memory runs out, half as many from there on, once.

    Args:
        run: Told which sequences and how much at once. It gives the same however the sequences are cut, and can be
            repeated.
        n_sequences: All.
        n_positions: Of a sequence.
        batch_size: Most sequences at once; no pass crosses a multiple of it.
        device: Where the model is.
        progress: Told the number of sequences done.

    Raises:
        StudyError: Memory ran out a second time.
    """
    at_once, is_halved = AT_ONCE[torch.device(device).type], False
    size = max(1, min(batch_size, at_once.tokens // n_positions))
    done = 0
    while done < n_sequences:
        stop = min(done + size, n_sequences, (done // batch_size + 1) * batch_size)
        failure = _failure(run, slice(done, stop), at_once)
        if failure is None:
            done = stop
            progress(done)
            signals.check()
        elif is_halved:
            raise StudyError(
                f"out of memory, also after halving: {failure}",
                "lower evaluate.batch_size, or evaluate fewer SAEs in one study",
            )
        else:
            is_halved, at_once, size = True, at_once.half, max(1, size // 2)
            logger.warning("out of memory; going on with half as much at once (%d sequences): %s", size, failure)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _failure(run: Callable[[slice, AtOnce], None], rows: slice, at_once: AtOnce) -> str | None:
    """Run; the words of the error if memory ran out. The error itself would keep every tensor of the run alive."""
    try:
        run(rows, at_once)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return first_line(error)
    return None
