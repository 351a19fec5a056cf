"""What is on disk is read before it gets a slot: until then the slot is others'."""

from __future__ import annotations

import pytest

from lora_cache.level import Level
from lora_cache.planner import Limits, Want
from lora_cache.policies import FIFO, LFU, LRU, Policy
from lora_cache.state import Tier
from tests.planner.driver import Driver, key_of


def on_the_way(driver: Driver) -> list[str]:
    return [move.load.name for move in driver.flights.values() if move.load]


def test_the_victim_is_used_until_the_newcomer_is_there() -> None:
    driver = Driver(Limits(1, 4))
    driver.use(1)
    newcomer = driver.acquire(2)
    assert driver.acquire(1) in driver.leases, "its slot is not given up yet"
    driver.release(min(driver.leases))
    assert driver.complete().demote == ()
    assert driver.complete().demote == (key_of(1),)
    assert newcomer in driver.leases


def test_a_read_that_fails_costs_nobody_a_slot() -> None:
    driver = Driver(Limits(1, 4))
    driver.use(1)
    newcomer = driver.acquire(2)
    driver.fail()
    assert newcomer in driver.refused
    assert driver.slots() == {"a1"}
    assert not len(driver.planner.waiting)


def test_who_is_read_is_overtaken_and_no_longer_than_that() -> None:
    driver = Driver(Limits(1, 4))
    driver.acquire(3, Want.STAGE)
    driver.settle()
    cold = driver.acquire(1)
    warm = driver.acquire(3)
    driver.complete(max(driver.flights))
    assert warm in driver.leases
    driver.complete()
    late = driver.acquire(2)
    driver.settle()
    driver.release(warm)
    driver.settle()
    assert cold in driver.leases
    assert late in driver.waiting


def test_as_many_are_read_ahead_as_there_are_slots() -> None:
    driver = Driver(Limits(2, 20))
    leases = [driver.lease(number) for number in (0, 1)]
    for number in range(5, 10):
        driver.acquire(number)
    assert on_the_way(driver) == ["a5", "a6"]
    driver.settle()
    driver.release(leases[0])
    assert on_the_way(driver) == ["a5", "a7"]
    assert [move.to for move in driver.flights.values()] == [Tier.GPU, Tier.HOST]


@pytest.mark.parametrize("policy", [LRU, LFU, FIFO])
def test_who_is_waited_for_does_not_leave_for_what_is_read_ahead(policy: type[Policy]) -> None:
    driver = Driver(Limits(1, 3), LRU, policy)
    driver.lease(0)
    first = driver.acquire(5)
    driver.settle()
    for number in (6, 7, 8):
        driver.acquire(number, Want.STAGE)
        driver.settle()
        assert driver.host() == {"a0", "a5", f"a{number}"}
    driver.acquire(9)
    driver.settle()
    assert first in driver.waiting
    assert "a5" in driver.host()


def test_all_who_waited_for_the_read_are_told_so() -> None:
    driver = Driver(Limits(1, 4))
    held = driver.lease(0)
    waiters = [driver.acquire(1), driver.acquire(1)]
    driver.settle()
    driver.release(held)
    driver.settle()
    assert {driver.granted[ticket].served_from for ticket in waiters} == {Tier.DISK}
    counters = driver.planner.counters
    assert (counters.disk_loads, counters.disk_hits, counters.host_hits) == (2, 3, 0)
    assert counters.activations == 2


def test_who_wants_it_in_host_memory_only_has_it_when_it_is_read() -> None:
    driver = Driver(Limits(1, 4))
    driver.lease(0)
    driver.acquire(1)
    others = [driver.acquire(1, Want.STAGE), driver.acquire(1, Want.PIN_HOST)]
    driver.complete()
    assert all(ticket in driver.granted for ticket in others)


def test_no_slot_is_set_aside_for_who_is_being_read() -> None:
    driver = Driver(Limits(1, 4, drain_after_s=5.0))
    held = driver.lease(0)
    waiter = driver.acquire(1)
    driver.now = 6.0
    driver.take(driver.planner.tick(6.0))
    assert not driver.planner.residency.draining()
    driver.complete()
    assert driver.planner.residency.draining() == [key_of(0)], "now it has waited too long"
    driver.release(held)
    driver.settle()
    assert waiter in driver.leases


def test_when_memory_is_scarce_one_leaves_with_the_slot() -> None:
    driver = Driver(Limits(1, 4))
    driver.use(1)
    driver.press(host=Level.HARD)
    driver.acquire(2)
    (move,) = driver.flights.values()
    assert (move.to, move.demote, move.drop) == (Tier.GPU, (key_of(1),), (key_of(1),))
