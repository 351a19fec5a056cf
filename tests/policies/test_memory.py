"""No policy remembers what has left, but for the history that LRU-2 keeps on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized

import pytest

from lora_cache.policies import FIFO, GDSF, LFU, LRU, LRUK, SLRU, Policy, Sieve
from tests.policies.notify import evict, load, prefetch, unload, use


def held(thing: object) -> int:
    """Entries of all containers in it."""
    if isinstance(thing, Sized):
        return len(thing)
    return sum(map(held, vars(thing).values())) if hasattr(thing, "__dict__") else 0


@pytest.mark.parametrize(
    "make", [FIFO, GDSF, LFU, lambda: LFU(math.inf), LRU, lambda: LRUK(history=5), Sieve, SLRU]
)
def test_what_has_left_is_forgotten(make: Callable[[], Policy]) -> None:
    policy = make()
    load(policy, -1, -2)
    for number in range(0, 1000, 4):
        prefetch(policy, number, number + 1)  # never used
        load(policy, number + 2, number + 3)
        use(policy, number + 2, number + 3, -1)
        evict(policy, number, number + 2)
        unload(policy, number + 1, number + 3)
    assert held(policy) < 50
