"""`auto` learns what fixed policies cannot, and never loses much to LRU."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable

import pytest

from lora_cache.adapter import AdapterKey
from lora_cache.errors import ConfigError
from lora_cache.policies import LRU, Auto, Policy, RemovalReason

Trace = list[tuple[float, int]]


def misses(policy: Policy, trace: Trace, slots: int, cost_s: float = 0.1) -> int:
    """Serve `trace` without leases, copies of equal size."""
    resident: set[AdapterKey] = set()
    missed = 0
    for now, number in trace:
        key = AdapterKey(f"k:{number}")
        if key not in resident:
            missed += 1
            if len(resident) == slots:
                victim = next(policy.rank_victims(now))
                policy.on_remove(victim, RemovalReason.EVICTED)
                resident.remove(victim)
            policy.on_insert(key, 1 << 20, cost_s, now)
            resident.add(key)
        policy.on_access(key, now)
    return missed


def at_rate(numbers: Iterable[int], per_s: float = 2.0) -> Trace:
    return [(index / per_s, number) for index, number in enumerate(numbers)]


def zipf(seed: int, length: int, adapters: int, skew: float) -> list[int]:
    rng = random.Random(seed)
    weights = [(rank + 1) ** -skew for rank in range(adapters)]
    return rng.choices(range(adapters), weights, k=length)


def recent_again(seed: int, length: int, depth: int) -> list[int]:
    """Traffic for which LRU is the right policy: the nearer the last use, the sooner the next."""
    rng = random.Random(seed)
    stack = list(range(200))
    out = []
    for _ in range(length):
        place = min(int(rng.expovariate(1 / depth)), len(stack) - 1)
        out.append(stack.pop(place))
        stack.insert(0, out[-1])
    return out


HOSTILE = {
    "zipf": zipf(1, 6000, 100, 1.0),
    "recent again": recent_again(2, 6000, 6),
    "uniform": zipf(3, 6000, 40, 0.0),
    "a loop, then recent again": [i % 9 for i in range(3000)] + recent_again(4, 6000, 5),
    "popularity turned over": zipf(5, 3000, 50, 1.2) + [49 - n for n in zipf(6, 6000, 50, 1.2)],
    "scans": [n if i % 3 else 1000 + i for i, n in enumerate(zipf(7, 6000, 50, 1.0))],
    "good times, then LRU's": [i % 5 for i in range(6000)] + recent_again(8, 6000, 3),
}


@pytest.mark.parametrize("slots", [1, 4, 8, 16])
@pytest.mark.parametrize("traffic", HOSTILE)
def test_never_loses_much_to_lru(traffic: str, slots: int) -> None:
    """The bound that the guard proves, for equal sizes and no leases: 1.02 × LRU + 8."""
    trace = at_rate(HOSTILE[traffic])
    assert misses(Auto(), trace, slots) <= 1.02 * misses(LRU(), trace, slots) + 8


def test_the_guard_is_what_holds_it() -> None:
    """Without one, what was learned in a loop is paid for when LRU's times come."""
    trace = at_rate(HOSTILE["good times, then LRU's"])
    bound = 1.02 * misses(LRU(), trace, 8) + 8
    assert misses(Auto(slack=1e9), trace, 8) > bound + 50


def test_a_loop_that_defeats_lru_is_found_out() -> None:
    trace = at_rate(i % 9 for i in range(8000))
    assert misses(LRU(), trace, 8) == 8000
    assert misses(Auto(), trace, 8) < 2000  # the optimum is one in eight


def test_stationary_popularity_is_learned() -> None:
    trace = at_rate(zipf(11, 12_000, 200, 1.0))
    assert misses(Auto(), trace, 8) < 0.85 * misses(LRU(), trace, 8)


def test_what_is_dear_to_reload_stays_longer() -> None:
    """Two kinds of adapters, asked for alike; one takes 50 times as long to load."""
    rng = random.Random(12)
    policy, resident = Auto(), OrderedDict[AdapterKey, None]()
    missed = {"dear": 0, "cheap": 0}
    for index in range(8000):
        kind = rng.choice(["dear", "cheap"])
        key, now = AdapterKey(f"{kind}:{rng.randrange(12)}"), float(index)
        if key not in resident:
            missed[kind] += 1
            if len(resident) == 8:
                victim = next(policy.rank_victims(now))
                policy.on_remove(victim, RemovalReason.EVICTED)
                del resident[victim]
            policy.on_insert(key, 1 << 20, 5.0 if kind == "dear" else 0.1, now)
            resident[key] = None
        policy.on_access(key, now)
    assert missed["dear"] < 0.9 * missed["cheap"]


def test_it_says_what_it_knows() -> None:
    policy = Auto()
    misses(policy, [(10.0 * use, 1) for use in range(30)], 4)
    assert policy.explain(AdapterKey("k:1"), 295.0) == "last used 5 s ago, usually 10.1 s apart"


def test_what_it_remembers_is_bounded() -> None:
    policy = Auto(history=50)
    misses(policy, at_rate(range(3000)), 4)  # every adapter once
    assert len(policy._ghosts) <= 50
    assert len(policy._questions) <= 4 * 4
    assert len(policy._asked) <= 2 * 4 * 4
    assert len(policy._shadow) <= 4


def test_the_same_calls_give_the_same_decisions() -> None:
    trace = at_rate(zipf(13, 4000, 60, 0.9))
    assert misses(Auto(), trace, 8) == misses(Auto(), trace, 8)


@pytest.mark.parametrize(
    "settings", [{"slack": -1}, {"grace": -1}, {"history": -1}, {"rate": 0}, {"rate": math.nan}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Auto(**settings)  # type: ignore[arg-type]
