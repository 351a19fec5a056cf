"""Slots that are set aside: as many as there are overdue waiters, and no longer than there are."""

from __future__ import annotations

from lora_cache.errors import PinnedError
from lora_cache.planner import Limits, Want
from lora_cache.state import CopyState
from tests.planner.driver import Driver


def draining(driver: Driver) -> set[str]:
    """Names of what is set aside, by the copies themselves."""
    return {c.key.name for c in driver.planner.residency.gpu if c.state is CopyState.DRAINING}


def full(slots: int) -> Driver:
    """Every slot is leased."""
    driver = Driver(Limits(slots, slots + 4, drain_after_s=5.0))
    for number in range(slots):
        driver.lease(number)
    return driver


def tick(driver: Driver, now: float) -> None:
    driver.now = now
    driver.take(driver.planner.tick(now))


def test_one_for_each_overdue_waiter_however_often_it_is_asked() -> None:
    driver = full(3)
    driver.acquire(7)
    driver.now = 2.0
    driver.acquire(8)
    driver.settle()
    for now in (5.0, 5.5, 6.0):
        tick(driver, now)
        assert draining(driver) == {"a0"}
    assert driver.planner.counters.drains == 1
    tick(driver, 7.0)
    assert draining(driver) == {"a0", "a1"}
    assert driver.planner.counters.drains == 2


def test_lifted_with_the_last_waiter_though_nobody_asks_for_the_slot() -> None:
    driver = full(2)
    waiter = driver.acquire(7)
    driver.settle()
    tick(driver, 5.0)
    assert draining(driver) == {"a0"}
    driver.cancel(waiter)
    assert not draining(driver)


def test_the_latest_are_lifted_first() -> None:
    driver = full(3)
    waiters = [driver.acquire(7), driver.acquire(8)]
    driver.settle()
    tick(driver, 5.0)
    assert draining(driver) == {"a0", "a1"}
    driver.cancel(waiters[0])
    assert draining(driver) == {"a0"}
    tick(driver, 6.0)
    assert draining(driver) == {"a0"}


def test_an_unload_goes_on_when_the_last_lease_ends_and_nobody_waits() -> None:
    driver = Driver(Limits(2, 4))
    held = driver.lease(1)
    unload = driver.unload(1)
    assert draining(driver) == {"a1"}
    driver.release(held)
    assert driver.complete().drop
    assert unload in driver.granted


def test_not_lifted_by_an_unload_that_is_refused() -> None:
    driver = full(2)
    driver.acquire(0, Want.PIN_HOST)
    waiter = driver.acquire(7)
    driver.settle()
    tick(driver, 5.0)
    assert draining(driver) == {"a0"}
    younger = driver.acquire(0)
    assert isinstance(driver.refused[driver.unload(0)], PinnedError)
    assert draining(driver) == {"a0"}
    assert younger in driver.waiting
    driver.cancel(waiter)
    assert draining(driver) == set()


def test_not_lifted_while_an_older_load_takes_the_waiter_s_host_copy() -> None:
    driver = Driver(Limits(2, 3, stages_without_slot=False, drain_after_s=5.0))
    driver.use(2)
    oldest_lease = driver.lease(0)
    driver.lease(1)
    driver.acquire(7)
    driver.acquire(2)
    tick(driver, 5.0)
    assert draining(driver) == {"a0", "a1"}
    driver.release(oldest_lease)
    (load,) = driver.flights.values()
    assert [key.name for key in load.drop] == ["a2"]
    assert draining(driver) == {"a0", "a1"}
    assert driver.acquire(1) in driver.waiting, "a younger one overtook"
