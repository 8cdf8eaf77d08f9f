"""Small trainings for the tests: a stream made from a seed, that can be cut, spoiled or run out of memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sae_transfer.saes.training import Schedule, Trainee, new_sae, train_saes
from sae_transfer.throughput import Throughput
from tests.saes.saes import SPARSITY

PROVENANCE = {"trained_on": "base", "sparsity_key": "k", "sparsity_value": 8, "seed": 0, "role": "trained"}
ALWAYS, NEVER = 1e-9, 60.0  # minutes between checkpoints


class Cut(BaseException):
    """The process is gone, as after SIGKILL: nothing handles it."""


class GivenStream:
    """Batches of a low-rank signal, made from a seed."""

    def __init__(
        self,
        n_batches: int = 60,
        batch_size: int = 64,
        *,
        spoil_at: int | None = None,
        cut_at: int | None = None,
        fail_at: tuple[int, Exception] | None = None,
        before: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.throughput = Throughput()
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(n_batches * batch_size, 6, generator=generator).relu()
        data = codes @ torch.randn(6, 16, generator=generator)
        self._data = data * 4 / data.norm(dim=-1).mean()
        self.n_batches, self.batch_size, self._spoil_at, self._cut_at = n_batches, batch_size, spoil_at, cut_at
        self._fail_at, self._before = fail_at, before

    def batches(self, start: int = 0) -> Iterator[torch.Tensor]:
        for n in range(start, self.n_batches):
            self._before(n)
            if n == self._cut_at:
                raise Cut
            if self._fail_at is not None and n == self._fail_at[0]:
                raise self._fail_at[1]
            batch = self._data[n * self.batch_size : (n + 1) * self.batch_size]
            yield batch * float("nan") if n == self._spoil_at else batch


def fresh(architecture: str, seed: int = 0, warmup: int = 0) -> Any:
    key, value = SPARSITY[architecture]
    return new_sae(
        architecture,
        d_in=16,
        d_sae=64,
        sparsity_key=key,
        sparsity_value=value,
        seed=seed,
        sparsity_warmup_steps=warmup,
        options={"apply_b_dec_to_input": False},
        metadata={},
        device="cpu",
    )


def trainee(directory: Path, architecture: str, *, warmup: int = 0, **identity: Any) -> Trainee:
    return Trainee(
        directory, fresh(architecture, warmup=warmup), PROVENANCE, {"SAE": architecture, "token set": 1, **identity}
    )


def train(
    trainees: list[Trainee], stream: Any, lr: float = 1e-2, *, every_min: float = NEVER, warmup: float = 0.0, **how: Any
) -> None:
    train_saes(
        trainees,
        stream,
        Schedule(lr, warmup, 0.2),
        norm_scale=0.5,
        autocast=False,
        device="cpu",
        label="train",
        checkpoint_every_min=every_min,
        **how,
    )


def steps_of(directory: Path) -> list[int]:
    """The checkpoints that are there."""
    return sorted(int(path.name) for path in (directory / "checkpoints").glob("[0-9]*"))


def files_of(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
