"""Memory grows scarce: what the planner stops, what it gives back, and when all of it returns."""

from __future__ import annotations

import pytest

from lora_cache.errors import LoadFailedError, MemoryPressureError, NoRoomError
from lora_cache.level import Level
from lora_cache.planner import Limits, Want
from lora_cache.policies import FIFO, LRU
from lora_cache.state import Tier
from tests.planner.driver import Driver, key_of

NONE, SOFT, HARD = Level


def filled(number: int = 8, slots: int = 2, **limits: object) -> Driver:
    """Adapters 0 to `number` - 1 of ten bytes were used, one after the other."""
    settings = {"host_bytes": 200, "shrink_every_s": 10.0} | limits
    driver = Driver(Limits(slots, 20, **settings), nbytes=lambda number: 10)  # type: ignore[arg-type]
    for each in range(number):
        driver.use(each)
    return driver


def test_hard_pressure_halves_what_is_held_in_policy_order_and_again_while_it_lasts() -> None:
    driver = filled()
    driver.press(HARD)
    assert driver.budgets == [(0.0, 40)]
    (move,) = driver.flights.values()
    assert move.load is None
    assert move.drop == tuple(map(key_of, range(4))), "the policy's best victims, and no more"
    driver.settle()
    assert driver.host() == {"a4", "a5", "a6", "a7"}

    assert driver.planner.next_deadline(0.0) == 10.0
    driver.now = 9.9
    driver.take(driver.planner.tick(9.9))
    assert not driver.flights
    driver.now = 10.0
    driver.take(driver.planner.tick(10.0))
    driver.settle()
    assert driver.host() == driver.slots() == {"a6", "a7"}
    counters = driver.planner.counters
    assert (counters.given_back, counters.given_back_bytes) == (6, 60)
    assert (counters.host_evictions, counters.unloads) == (0, 0)

    for now in (20.0, 30.0):  # nobody idle is left: nothing more to do
        driver.now = now
        driver.take(driver.planner.tick(now))
    assert driver.budgets == [(0.0, 40), (10.0, 20)]


def test_the_policy_of_host_memory_decides() -> None:
    driver = Driver(Limits(1, 9, 100), LRU, FIFO, nbytes=lambda number: 10)
    for number in (0, 1, 2, 3, 0):
        driver.use(number)
    driver.press(HARD)
    (move,) = driver.flights.values()
    assert move.drop == (key_of(1), key_of(2)), "0 came first, and sits in the slot"


@pytest.mark.parametrize("max_in_flight", [None, 1])
def test_what_is_in_use_stays_and_leaves_when_it_may(max_in_flight: int | None) -> None:
    driver = filled(0, max_in_flight=max_in_flight)
    driver.acquire(5, Want.PIN_HOST)
    driver.settle()
    lease = driver.lease(0)
    driver.use(1)
    driver.use(2)
    driver.press(HARD)
    driver.now = 10.0
    driver.take(driver.planner.tick(10.0))
    driver.settle()
    assert driver.host() == {"a0", "a2", "a5"}, "leased, in a slot, pinned"
    driver.release(lease)
    assert not driver.flights, "it is in a slot"
    driver.take(driver.planner.unpin(key_of(5), 10.0))
    driver.settle()
    assert driver.host() == {"a0", "a2"}


def test_requests_are_served_however_small_the_budget() -> None:
    """A cold one comes into every slot; who leaves a slot leaves host memory with it."""
    driver = filled(3)
    driver.press(HARD)
    driver.settle()
    for step in range(1, 4):
        driver.now = 10.0 * step
        driver.take(driver.planner.tick(driver.now))
    driver.settle()
    assert driver.planner.residency.host.target is not None
    leases = [driver.lease(number) for number in (10, 11)]
    assert driver.slots() == driver.host() == {"a10", "a11"}
    late = driver.acquire(12)
    driver.release(leases[0])
    (move,) = driver.flights.values()
    assert move.demote == move.drop == (key_of(10),), "in one move: the newcomer first"
    driver.settle()
    assert late in driver.leases
    assert not driver.refused


def test_an_empty_cache_under_pressure_still_fills_its_slots() -> None:
    driver = filled(0)
    driver.press(HARD)
    assert driver.budgets == [(0.0, 0)]
    for number in range(2):
        driver.lease(number)
    assert driver.slots() == {"a0", "a1"}


def test_the_configured_budget_still_binds() -> None:
    driver = filled(0, host_bytes=15)
    driver.lease(0)
    driver.press(HARD)
    driver.acquire(1)
    assert not driver.flights
    assert len(driver.planner.waiting) == 1


def test_what_was_on_its_way_out_counts_as_gone() -> None:
    driver = filled()
    driver.press(HARD)
    driver.acquire(30)  # while four are leaving
    _, load = driver.flights.values()
    assert load.drop == (key_of(4),), "room for itself, and no more"
    driver.settle()
    assert driver.planner.residency.host.used_bytes == 40


def test_soft_pressure_stops_what_is_optional_and_gives_nothing_back() -> None:
    driver = filled(4)
    driver.acquire(3, Want.PIN_GPU)
    driver.press(SOFT)
    assert (driver.flights, driver.budgets) == ({}, [])
    staged = driver.acquire(9, Want.STAGE)
    error = driver.refused[staged]
    assert isinstance(error, MemoryPressureError)
    assert isinstance(error, NoRoomError), "prefetch reports it"
    assert "host memory (soft pressure) is scarce" in str(error)
    assert driver.granted[driver.acquire(1, Want.STAGE)].served_from is Tier.HOST
    for number, want in ((1, Want.PIN_HOST), (2, Want.PIN_GPU), (9, Want.PIN_HOST)):
        ticket = driver.acquire(number, want)
        assert isinstance(driver.refused[ticket], MemoryPressureError), (number, want)
    for want in (Want.PIN_GPU, Want.PIN_HOST):
        assert driver.acquire(3, want) in driver.granted, "it is pinned already"
    counters = driver.planner.counters
    assert (counters.prefetches_refused, counters.pins_refused) == (1, 3)
    driver.use(9)
    assert "a9" in driver.slots()

    driver.press(NONE)
    driver.acquire(10, Want.STAGE)
    driver.acquire(1, Want.PIN_HOST)
    driver.settle()
    assert {"a1", "a10"} <= driver.host()


def test_pressure_on_a_gpu_stops_speculation_and_pins_into_slots() -> None:
    driver = filled(4)
    driver.press(gpu=HARD)
    assert (driver.flights, driver.budgets) == ({}, []), "beside slots nothing is held there"
    assert "GPU memory (hard pressure)" in str(driver.refused[driver.acquire(9, Want.STAGE)])
    assert driver.acquire(3, Want.PIN_GPU) in driver.refused
    assert driver.acquire(3, Want.PIN_HOST) in driver.granted


def test_speculation_in_line_is_told_when_pressure_comes_and_others_wait_on() -> None:
    driver = filled(0, slots=1, max_in_flight=1)
    driver.acquire(0)
    staged, wanted = driver.acquire(1, Want.STAGE), driver.acquire(2)
    driver.press(SOFT)
    assert isinstance(driver.refused[staged], MemoryPressureError)
    while not driver.leases:
        driver.complete()
    driver.release(min(driver.leases))
    driver.settle()
    assert wanted in driver.leases


def test_speculation_that_is_refused_takes_no_place_from_those_behind_it() -> None:
    driver = Driver(Limits(1, 1, stages_without_slot=False, max_in_flight=1))
    driver.acquire(2)
    driver.acquire(0, Want.STAGE)
    wanted = driver.acquire(1)
    driver.press(SOFT)
    driver.fail()
    driver.settle()
    assert wanted in driver.leases


def test_a_load_under_way_runs_to_its_end() -> None:
    driver = filled(0)
    ticket = driver.acquire(0, Want.STAGE)
    driver.press(HARD)
    driver.complete()
    assert ticket in driver.granted
    driver.now = 10.0
    driver.take(driver.planner.tick(10.0))
    driver.settle()
    assert driver.host() == set(), "idle, and beyond the budget"


def test_the_budget_stays_small_until_pressure_is_over_and_is_back_at_once() -> None:
    driver = filled()
    driver.press(HARD)
    driver.settle()
    driver.press(SOFT)
    driver.now = 100.0
    driver.take(driver.planner.tick(100.0))
    assert driver.planner.next_deadline(100.0) is None
    driver.use(0)
    assert driver.planner.residency.host.used_bytes == 40, "it does not grow"
    driver.press(NONE)
    assert driver.budgets == [(0.0, 40), (100.0, None)]
    for number in range(8):
        driver.use(number)
    assert len(driver.host()) == 8
    assert not driver.planner.awaits_tick


def test_levels_that_come_and_go_shrink_it_no_faster() -> None:
    driver = filled()
    for step in range(20):
        driver.now = step * 1.0
        driver.press(HARD)
        driver.press(SOFT)
    assert driver.budgets == [(0.0, 40), (10.0, 20)]
    for step in range(20, 40):
        driver.now = step * 1.0
        driver.press(HARD)
        driver.settle()
        driver.press(NONE)
        driver.use(step)
    assert [at for at, budget in driver.budgets if budget is not None] == [0.0, 10.0, 30.0]


def test_an_engine_that_does_not_drop_is_asked_again_later() -> None:
    driver = filled(4, retry_s=3.0)
    driver.press(HARD)
    driver.fail()
    assert not driver.flights
    assert driver.host() == {"a0", "a1", "a2", "a3"}
    assert driver.planner.next_deadline(0.0) == 3.0
    driver.now = 3.0
    driver.take(driver.planner.tick(3.0))
    driver.settle()
    assert driver.host() == {"a2", "a3"}
    assert driver.planner.counters.given_back == 2


def test_what_left_although_the_engine_failed_is_counted() -> None:
    driver = filled(4)
    driver.press(HARD)
    op, move = driver.flights.popitem()
    error = LoadFailedError("half of it")
    driver.take(driver.planner.failed(op, error, 0.0, dropped=move.drop[:1]))
    counters = driver.planner.counters
    assert (counters.given_back, counters.given_back_bytes) == (1, 10)


def test_a_request_for_what_is_just_leaving_waits_and_loads_it_anew() -> None:
    driver = filled(4)
    driver.press(HARD)
    ticket = driver.acquire(0)
    staged = driver.acquire(1, Want.STAGE)
    driver.settle()
    assert driver.leases[ticket] == key_of(0)
    assert driver.granted[ticket].served_from is Tier.DISK
    assert isinstance(driver.refused[staged], MemoryPressureError)


def test_who_gives_up_a_slot_for_what_is_in_host_memory_leaves_after_that_load() -> None:
    driver = filled(2, slots=1)
    driver.acquire(7, Want.PIN_HOST)
    driver.settle()
    driver.press(HARD)
    driver.settle()
    assert driver.host() == {"a1", "a7"}, "in the slot, and pinned"
    driver.lease(7)
    assert driver.slots() == {"a7"}
    (move,) = driver.flights.values()
    assert move.drop == (key_of(1),), "twenty bytes of fifteen"
