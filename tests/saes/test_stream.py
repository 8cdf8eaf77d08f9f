"""The stream: batch n is a function of (token set, seed, n), and every position is used once."""

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae_transfer.saes import stream as stream_module
from sae_transfer.saes.stream import ActivationStream, measure_norm_scale

D_MODEL = 4


class PositionSplicer:
    """A model whose activation at a position tells the token that stands there."""

    restarts = is_residual = True
    difference: float | None = None
    head: Any = SimpleNamespace(weight=torch.zeros(1, D_MODEL))

    def __init__(self) -> None:
        self.passes = 0
        self.threads = set[str]()
        self.fails = False

    def run_to(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.threads.add(threading.current_thread().name)
        if self.fails:
            raise RuntimeError("out of memory")
        return tokens[..., None].float().expand(*tokens.shape, D_MODEL) + 1

    def run_on(self, tokens: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a stream never runs on from the site")


def make(
    monkeypatch: pytest.MonkeyPatch,
    *,
    pos: int,
    batch_size: int,
    n_batches: int,
    seed: int = 0,
    drop: float | None = None,
    prefetches: bool = False,
    device: str = "cpu",
) -> tuple[ActivationStream, PositionSplicer]:
    """A stream in blocks of three batches over sequences whose token ids count up."""
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 3 * 4 * D_MODEL * batch_size)
    rows = -(-n_batches * batch_size // pos)
    sequences = np.arange(rows * pos, dtype=np.uint16).reshape(rows, pos)
    splicer = PositionSplicer()
    stream = ActivationStream(
        splicer,
        sequences,
        d_model=D_MODEL,
        norm_scale=2.0,
        batch_size=batch_size,
        n_batches=n_batches,
        seed=seed,
        drop_norm_above=drop,
        device=device,
        prefetches=prefetches,
    )
    return stream, splicer


@pytest.mark.parametrize("pos", [8, 10, 7])  # dividing a block, straddling it, dividing nothing
def test_every_position_is_used_once_scaled_and_shuffled(monkeypatch: pytest.MonkeyPatch, pos: int) -> None:
    stream, _ = make(monkeypatch, pos=pos, batch_size=16, n_batches=8)
    seen = torch.cat([batch[:, 0] / 2 - 1 for batch in stream.batches()])
    assert torch.equal(seen.sort().values, torch.arange(8.0 * 16))
    assert not torch.equal(seen, seen.sort().values)
    assert torch.equal(seen[:48].sort().values, torch.arange(48.0))  # shuffled within blocks


def test_any_batch_can_be_reached_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    through, _ = make(monkeypatch, pos=10, batch_size=16, n_batches=8)
    expected = list(through.batches())
    for n in (7, 0, 4):
        alone, splicer = make(monkeypatch, pos=10, batch_size=16, n_batches=8)
        assert torch.equal(alone.batch(n), expected[n])
        assert splicer.passes == 1


@pytest.mark.parametrize("drop", [None, 1.5])
def test_a_stream_that_prefetches_gives_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, drop: float | None, device: str
) -> None:
    plain, _ = make(monkeypatch, pos=10, batch_size=16, n_batches=8, drop=drop)
    ahead, splicer = make(monkeypatch, pos=10, batch_size=16, n_batches=8, drop=drop, prefetches=True, device=device)
    expected = list(plain.batches())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ahead.batches(), expected, strict=True))
    assert splicer.passes == 3  # each of the blocks once
    assert all(name.startswith("activations") for name in splicer.threads)
    assert torch.equal(ahead.batch(1).cpu(), expected[1])  # back to an earlier block
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ahead.batches(4), expected[4:], strict=True))


def test_the_next_block_is_begun_with_the_present_one_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, splicer = make(monkeypatch, pos=10, batch_size=16, n_batches=12, prefetches=True)
    stream.batch(0)
    assert stream._ahead is not None
    held = weakref.ref(stream._ahead.result().acts)
    assert splicer.passes == 2
    stream.batch(3)
    assert stream._block is not None
    assert stream._block.acts is held()
    assert stream._ahead is not None
    stream._ahead.result()
    assert splicer.passes == 3
    stream.batch(6)
    assert held() is None  # at most two blocks are in memory
    stream.batch(9)
    assert stream._ahead is None  # there is no block after the last one


def test_a_stream_that_is_left_lets_go_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, splicer = make(monkeypatch, pos=10, batch_size=16, n_batches=12, prefetches=True)
    model, run_to, goes_on = weakref.ref(splicer), PositionSplicer.run_to, threading.Event()
    next(stream.batches())
    assert stream._ahead is not None
    stream._ahead.result()

    def run_when_allowed(self: PositionSplicer, tokens: torch.Tensor) -> torch.Tensor:
        goes_on.wait(30)
        return run_to(self, tokens)

    monkeypatch.setattr(PositionSplicer, "run_to", run_when_allowed)
    stream.batch(3)  # the next block is being made
    threading.Timer(0.1, goes_on.set).start()
    stream.close()
    del stream, splicer
    gc.collect()
    assert model() is None


def test_a_failure_in_the_next_block_is_raised_when_that_block_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, splicer = make(monkeypatch, pos=10, batch_size=16, n_batches=6, prefetches=True)
    batches = stream.batches()
    next(batches)
    assert stream._ahead is not None
    stream._ahead.result()
    stream._ahead, splicer.fails = None, True
    next(batches)
    next(batches)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(batches)


def test_the_stream_counts_what_the_model_and_the_user_of_the_batches_did(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = make(monkeypatch, pos=10, batch_size=16, n_batches=8)
    for _ in stream.batches(4):
        pass
    assert stream.throughput._tokens == {"sae_step": 4 * 16, "language_model": 5 * 16}  # the block of batch 3 to 5


def test_another_seed_is_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = make(monkeypatch, pos=8, batch_size=16, n_batches=4)
    other, _ = make(monkeypatch, pos=8, batch_size=16, n_batches=4, seed=1)
    assert not torch.equal(one.batch(0), other.batch(0))


def test_norms_above_the_limit_are_left_out_and_batches_stay_full(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = make(monkeypatch, pos=8, batch_size=16, n_batches=3, drop=1.5)
    seen = torch.cat([batch[:, 0] / 2 for batch in stream.batches()])
    assert len(seen) == 48
    assert seen.max() <= 1.5 * 24.5  # the norms are proportional to 1 to 48; torch's median of them is 24
    assert seen.max() > 30


def test_the_norm_scale_is_sqrt_d_over_the_mean_norm() -> None:
    sequences = np.arange(12, dtype=np.uint16).reshape(3, 4)
    mean_norm = 2 * np.mean(np.arange(12) + 1)  # d_model equal values: norm is value times sqrt(4)
    assert measure_norm_scale(PositionSplicer(), sequences, D_MODEL, "cpu") == pytest.approx(2 / mean_norm)


def test_only_the_positions_that_count_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 3 * 4 * D_MODEL * 4)
    sequences = np.arange(40, dtype=np.uint16).reshape(8, 5)
    counted = np.random.default_rng(0).random((8, 5)) < 0.6
    n_batches = int(counted.sum()) // 4
    stream = ActivationStream(
        PositionSplicer(),
        sequences,
        d_model=D_MODEL,
        norm_scale=1.0,
        batch_size=4,
        n_batches=n_batches,
        seed=0,
        drop_norm_above=None,
        device="cpu",
        positions=counted,
    )
    seen = torch.cat([batch[:, 0] - 1 for batch in stream.batches()]).sort().values
    assert seen.tolist() == sequences[counted][: n_batches * 4].tolist()
