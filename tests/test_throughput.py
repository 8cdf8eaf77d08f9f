"""Rates: time inside another part counts once, threads overlap, and what did no tokens has no rate."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sae_transfer import throughput as throughput_module
from sae_transfer.throughput import Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is moved."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_rate_is_tokens_over_the_seconds_of_its_part(clock: SimpleNamespace) -> None:
    throughput = Throughput()
    for seconds in (1.0, 3.0):
        with throughput.timing("sae_step", 100):
            clock.now += seconds
        clock.now += 50
    assert throughput.rates() == {"sae_step": 50}


def test_time_inside_another_part_counts_for_the_inner_one_alone(clock: SimpleNamespace) -> None:
    throughput = Throughput()
    with throughput.timing("sae_step", 60):
        clock.now += 1
        for _ in range(2):
            with throughput.timing("checkpoint", 30):
                clock.now += 4
        clock.now += 2
    with throughput.timing("sae_step"):
        clock.now += 1
    assert throughput.rates() == {"checkpoint": 8, "sae_step": 15}  # 60 in 8 s, 60 in 4 s
    assert str(throughput) == "checkpoint 8 tokens/s, sae step 15 tokens/s"


def test_a_part_that_failed_has_its_time_counted(clock: SimpleNamespace) -> None:
    throughput = Throughput()

    def fail() -> None:
        with throughput.timing("tokens"):
            throughput.count("tokens", 10)
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert throughput.rates() == {"tokens": 5}


def test_parts_in_two_threads_overlap() -> None:
    throughput = Throughput()

    def other() -> None:
        with throughput.timing("language_model", 10):
            time.sleep(0.1)

    with ThreadPoolExecutor(1) as pool, throughput.timing("sae_step", 10):
        pool.submit(other).result()
    rates = throughput.rates()
    assert 0 < rates["sae_step"] <= 100  # the other thread's time is not taken off this one's
    assert 0 < rates["language_model"] <= 100


def test_what_did_no_tokens_has_no_rate(clock: SimpleNamespace) -> None:
    throughput = Throughput()
    with throughput.timing("sae_step"):
        clock.now += 1
    assert throughput.rates() == {}
    assert str(throughput) == ""
