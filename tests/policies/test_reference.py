"""Through the real planner, the policies agree with implementations that others wrote.

cachetools tells its victims, so those are compared one by one; libcachesim counts misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cachetools
import libcachesim
import pytest
from libcachesim import libcachesim_python as c_api

from lora_cache.policies import FIFO, GDSF, LFU, LRU, LRUK, SLRU, Policy, Sieve
from tests.policies.models import SLRUModel
from tests.policies.replay import recorded_trace, replay, replay_bytes, zipf_trace

SEEDS = [1, 2, 3]


def plain_lfu() -> Policy:
    return LFU(math.inf)


# ---------------------------------------------------------------------- cachetools


def cachetools_victims(trace: Sequence[int], base: type[Any], size: int) -> list[int]:
    victims: list[int] = []

    class Recording(base):  # type: ignore[misc]
        def popitem(self) -> Any:
            item = super().popitem()
            victims.append(item[0])
            return item

    cache = Recording(size)
    for number in trace:
        if cache.get(number) is None:
            cache[number] = True
    return victims


CACHETOOLS: list[Any] = [
    pytest.param(FIFO, cachetools.FIFOCache, id="fifo"),
    pytest.param(LRU, cachetools.LRUCache, id="lru"),
    pytest.param(plain_lfu, cachetools.LFUCache, id="lfu"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize(("policy", "reference"), CACHETOOLS)
def test_same_victims_as_cachetools(
    policy: Callable[[], Policy], reference: type[Any], slots: int, seed: int
) -> None:
    trace = zipf_trace(seed)
    expected = cachetools_victims(trace, reference, slots)
    assert replay(trace, policy, slots).victims == expected
    assert len(expected) > 300


# ---------------------------------------------------------------------- libcachesim


def request(number: int, now: int, nbytes: int = 1) -> Any:
    return libcachesim.Request(obj_size=nbytes, obj_id=number + 1, clock_time=now)


def libcachesim_misses(
    trace: Sequence[int], make: Callable[..., Any], size: int, *settings: str
) -> int:
    cache = make(libcachesim.CommonCacheParams(size, hashpower=10), *settings)
    return sum(not cache.get(request(number, now)) for now, number in enumerate(trace))


LIBCACHESIM: list[Any] = [
    pytest.param(FIFO, c_api.FIFO_init, id="fifo"),
    pytest.param(LRU, c_api.LRU_init, id="lru"),
    pytest.param(Sieve, c_api.Sieve_init, id="sieve"),
    # It forgets the uses of what leaves; with history, see test_models.py.
    pytest.param(lambda: LRUK(history=0), c_api.LRU_K_init, id="lru_k"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [4, 9, 32])
@pytest.mark.parametrize(("policy", "reference"), LIBCACHESIM)
def test_same_misses_as_libcachesim(
    policy: Callable[[], Policy], reference: Callable[..., Any], slots: int, seed: int
) -> None:
    trace = zipf_trace(seed)
    assert replay(trace, policy, slots).misses == libcachesim_misses(trace, reference, slots)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [5, 10, 40])
def test_slru_has_the_same_misses_as_libcachesim(slots: int, seed: int) -> None:
    """Where its definition and the classic one are the same.

    libcachesim rounds each of the two segments down and leaves the rest of the capacity empty, so
    slots come in fives; and it puts newcomers into an empty protected segment.  The trace
    therefore begins by protecting 4/5, then replacing all that is on probation.
    """
    protected = slots * 4 // 5
    begin = [*range(1000, 1000 + slots), *range(1000, 1000 + protected)]
    trace = [*begin, *range(2000, 2000 + slots - protected), *zipf_trace(seed)]
    expected = libcachesim_misses(trace, c_api.SLRU_init, slots, "seg-size=1:4")
    assert replay(trace, SLRU, slots).misses == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", [20, 60, 150])
def test_gdsf_has_the_same_misses_as_libcachesim(budget: int, seed: int) -> None:
    """Its `get` refuses newcomers that are worth less than their victims; here all must come in."""

    def nbytes(number: int) -> int:
        return 1 + number * 7 % 13

    trace = zipf_trace(seed)
    cache = c_api.GDSF_init(libcachesim.CommonCacheParams(budget, hashpower=10))
    misses = 0
    for now, number in enumerate(trace):
        wanted = request(number, now, nbytes(number))
        if cache.find(wanted, True) is None:
            misses += 1
            while cache.need_eviction(wanted):
                cache.evict(wanted)
            cache.insert(wanted)
    # Every load costs a million there.
    assert replay_bytes(trace, GDSF, budget, nbytes, lambda number: 1e6).misses == misses


# ---------------------------------------------------------------------- recorded traces

AZURE, SERVEGEN = "azure_functions_200", "servegen_reason_73"


@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize("name", [AZURE, SERVEGEN])
@pytest.mark.parametrize(("policy", "reference"), CACHETOOLS[1:])
def test_recorded_trace_like_cachetools(
    policy: Callable[[], Policy], reference: type[Any], name: str, slots: int
) -> None:
    trace = recorded_trace(name, 10_000)
    assert replay(trace, policy, slots).victims == cachetools_victims(trace, reference, slots)


@pytest.mark.parametrize("slots", [4, 8, 16, 32])
@pytest.mark.parametrize("name", [AZURE, SERVEGEN])
def test_recorded_trace_like_the_slru_model(name: str, slots: int) -> None:
    trace = recorded_trace(name, 10_000)
    model = SLRUModel(slots)
    expected = [victim for number in trace for victim in model.request(number)]
    assert replay(trace, SLRU, slots).victims == expected


@pytest.mark.long
def test_a_whole_day() -> None:
    """The figure published with the trace: SLRU on 16 slots misses 3.18 %."""
    trace = recorded_trace(SERVEGEN)
    ours = replay(trace, SLRU, 16)
    assert ours.misses == 6355
    assert round(ours.misses / len(trace), 4) == 0.0318
