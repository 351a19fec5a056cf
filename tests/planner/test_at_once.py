"""A miss that finds nobody waiting skips the line, and cannot be told from one that did not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lora_cache.planner import Limits, Planner, Start, Want
from lora_cache.planner.waiting import Ticket
from lora_cache.policies import LFU, LRU, Policy
from lora_cache.testing import RandomPolicy
from tests.planner.driver import Driver, key_of


class ThroughTheLine(Planner):
    def _start_at_once(self, request: Ticket, now: float) -> Start | None:
        return None


def play(
    planner: type[Planner], policy: Callable[[], Policy], limits: Limits, seed: int
) -> list[object]:
    """What is seen from outside after each of 200 random events, drains and failures included."""
    rng = random.Random(seed)
    driver = Driver(limits, policy, policy, nbytes=lambda number: 1 + number % 3)
    driver.planner = planner(limits, policy(), policy())
    wants = rng.choice([[Want.LEASE], [Want.LEASE] * 4 + list(Want)])
    seen: list[object] = []
    for _ in range(200):
        driver.now += rng.choice([0.0, 0.1, 0.7])
        event = rng.random()
        if event < 0.45:
            driver.acquire(rng.randrange(9), rng.choice(wants))
        elif event < 0.65 and driver.leases:
            driver.release(rng.choice(sorted(driver.leases)))
        elif event < 0.85 and driver.flights:
            driver.complete(rng.choice(sorted(driver.flights)))
        elif event < 0.88 and driver.flights:
            driver.fail(rng.choice(sorted(driver.flights)))
        elif event < 0.92:
            driver.unload(rng.randrange(9))
        elif event < 0.95 and driver.waiting:
            driver.cancel(rng.choice(sorted(driver.waiting)))
        elif event < 0.97:
            driver.take(driver.planner.unpin(key_of(rng.randrange(9)), driver.now))
        else:
            driver.take(driver.planner.tick(driver.now))
        seen += [
            str(driver.planner.counters),
            dict(driver.flights),
            dict(driver.granted),
            {ticket: str(error) for ticket, error in driver.refused.items()},
            driver.slots(),
            driver.host(),
        ]
    return seen


@pytest.mark.parametrize("max_in_flight", [None, 1])
@pytest.mark.parametrize("host_bytes", [None, 9])
@pytest.mark.parametrize(
    "policy", [LRU, LFU, lambda: RandomPolicy(3)], ids=["lru", "lfu", "random"]
)
def test_same_decisions_with_and_without_the_line(
    policy: Callable[[], Policy], host_bytes: int | None, max_in_flight: int | None
) -> None:
    for seed in range(12):
        slots = 1 + seed % 4
        limits = Limits(
            slots, slots + seed % 3, host_bytes, max_in_flight=max_in_flight, drain_after_s=1.0
        )
        assert play(Planner, policy, limits, seed) == play(ThroughTheLine, policy, limits, seed)
