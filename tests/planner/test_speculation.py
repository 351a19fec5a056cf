"""Prefetches take turns; what somebody waits for does not wait for them."""

from __future__ import annotations

from lora_cache.errors import LoadFailedError, MemoryPressureError
from lora_cache.level import Level
from lora_cache.planner import Limits, Want
from lora_cache.state import Tier
from tests.planner.driver import Driver, key_of


def prefetching(number: int, **limits: int | None) -> tuple[Driver, list[int]]:
    """Adapters 0 to `number` are being prefetched, two at a time."""
    driver = Driver(Limits(4, 20, **{"max_speculative": 2} | limits))  # type: ignore[arg-type]
    return driver, [driver.acquire(each, Want.STAGE) for each in range(number)]


def loading(driver: Driver) -> list[str]:
    return [move.load.name for move in driver.flights.values() if move.load]


def test_they_come_in_order_and_a_few_at_a_time() -> None:
    driver, tickets = prefetching(5)
    assert loading(driver) == ["a0", "a1"]
    driver.complete()
    assert loading(driver) == ["a1", "a2"]
    while driver.flights:
        driver.complete()
    assert [driver.granted[ticket].served_from for ticket in tickets] == [Tier.DISK] * 5
    assert driver.host() == {"a0", "a1", "a2", "a3", "a4"}


def test_without_a_limit_all_begin() -> None:
    driver, _ = prefetching(5, max_speculative=None)
    assert len(driver.flights) == 5


def test_a_lease_on_one_that_was_put_off_begins_at_once() -> None:
    driver, tickets = prefetching(5)
    lease = driver.acquire(4)
    op = next(op for op, move in driver.flights.items() if move.load == key_of(4))
    assert driver.complete(op).urgent
    assert driver.complete(max(driver.flights)).to is Tier.GPU
    assert lease in driver.leases
    while driver.flights:
        assert driver.complete().load != key_of(4), "loaded twice"
    assert driver.granted[tickets[4]].served_from is Tier.GPU


def test_nor_does_one_wait_that_is_not_prefetched() -> None:
    driver, _ = prefetching(5)
    driver.acquire(9)
    driver.acquire(8, Want.PIN_HOST)
    assert loading(driver) == ["a0", "a1", "a9", "a8"]


def test_what_is_on_its_way_or_there_needs_no_turn() -> None:
    driver, _ = prefetching(2)
    lease = driver.acquire(5)
    again = [driver.acquire(each, Want.STAGE) for each in (1, 5)]
    driver.complete(max(driver.flights))
    assert again[1] in driver.granted
    driver.complete(max(driver.flights))
    assert lease in driver.leases
    assert driver.granted[driver.acquire(5, Want.STAGE)].served_from is Tier.GPU
    driver.complete(max(driver.flights))
    assert again[0] in driver.granted


def test_who_does_not_wait_any_more_gets_no_turn() -> None:
    driver, tickets = prefetching(4)
    driver.cancel(tickets[2])
    driver.complete()
    assert loading(driver) == ["a1", "a3"]


def test_one_that_fails_gives_its_turn_on() -> None:
    driver, tickets = prefetching(4)
    twice = driver.acquire(0, Want.STAGE)  # travels with the first
    later = driver.acquire(3, Want.STAGE)
    driver.fail()
    assert isinstance(driver.refused[tickets[0]], LoadFailedError)
    assert isinstance(driver.refused[twice], LoadFailedError)
    assert loading(driver) == ["a1", "a2"]
    driver.complete()
    driver.fail(max(driver.flights))
    assert isinstance(driver.refused[later], LoadFailedError), "not tried anew right away"
    assert loading(driver) == ["a2"]


def test_when_memory_grows_scarce_none_gets_a_turn() -> None:
    driver, tickets = prefetching(5)
    driver.press(host=Level.SOFT)
    driver.complete()
    assert loading(driver) == ["a1"]
    assert all(isinstance(driver.refused[ticket], MemoryPressureError) for ticket in tickets[2:])
    driver.complete()
    driver.press()
    driver.acquire(7, Want.STAGE)
    assert loading(driver) == ["a7"]


def test_an_engine_that_loads_one_at_a_time_loads_what_is_waited_for_next() -> None:
    like_stock = Limits(4, 8, stages_without_slot=False, max_in_flight=1, max_speculative=1)
    driver = Driver(like_stock)
    for number in range(4):
        driver.acquire(number, Want.STAGE)
    driver.acquire(9)
    driver.acquire(3)
    order = []
    while driver.flights:
        order += loading(driver)
        driver.complete()
    assert order == ["a0", "a9", "a3", "a1", "a2"]
