"""Our LRU and LFU agree with cachetools', victim by victim, through the real planner."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import cachetools
import pytest

from lora_cache.planner import Limits
from lora_cache.policies import LFU, LRU, Policy
from tests.planner.driver import Driver, key_of


def zipf_trace(seed: int, length: int, adapters: int, skew: float) -> list[int]:
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** skew for rank in range(adapters)]
    return rng.choices(range(adapters), weights, k=length)


def recording(base: type[Any]) -> type[Any]:
    class Recording(base):  # type: ignore[misc]
        evicted: list[Any]

        def popitem(self) -> Any:
            item = super().popitem()
            self.evicted.append(item[0])
            return item

    return Recording


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize(
    ("policy", "reference"),
    [(LRU, cachetools.LRUCache), (lambda: LFU(math.inf), cachetools.LFUCache)],
    ids=["lru", "lfu"],
)
def test_same_victims_as_cachetools(
    policy: Callable[[], Policy], reference: type[Any], slots: int, seed: int
) -> None:
    trace = zipf_trace(seed, 3000, 60, 0.9)
    cache = recording(reference)(slots)
    cache.evicted = []
    driver = Driver(Limits(slots, 10_000), policy, LRU)
    ours: list[Any] = []
    for now, number in enumerate(trace):
        if cache.get(number) is None:
            cache[number] = True
        driver.now = float(now)
        before = {copy.key for copy in driver.planner.residency.gpu}
        driver.use(number)
        gone = before - {copy.key for copy in driver.planner.residency.gpu}
        ours += gone
    assert ours == [key_of(number) for number in cache.evicted]
    assert len(ours) > 500
