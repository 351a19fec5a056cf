"""What the planner decides, case by case."""

from __future__ import annotations

import pytest

from lora_cache.errors import LoadFailedError, NoRoomError, PinnedError, UnsupportedAdapterError
from lora_cache.planner import Holdings, Limits, Want
from lora_cache.state import TRANSITIONS, Copy, CopyState, IllegalTransitionError, Tier
from tests.planner.driver import Driver, key_of


def test_a_miss_loads_and_a_hit_does_not() -> None:
    driver = Driver(Limits(2, 4))
    first = driver.acquire(1)
    assert driver.complete().to is Tier.HOST
    assert driver.complete().to is Tier.GPU
    assert driver.granted[first].served_from is Tier.DISK
    second = driver.acquire(1)
    assert driver.granted[second].served_from is Tier.GPU
    assert not driver.flights


def test_an_evicted_slot_stays_in_host_memory() -> None:
    driver = Driver(Limits(1, 2))
    driver.use(1)
    driver.use(2)
    assert driver.slots() == {"a2"}
    assert driver.host() == {"a1", "a2"}
    ticket = driver.lease(1)
    assert driver.granted[ticket].served_from is Tier.HOST


def test_callers_of_one_adapter_share_a_load() -> None:
    driver = Driver(Limits(2, 4))
    tickets = [driver.acquire(1) for _ in range(5)]
    assert len(driver.flights) == 1
    driver.complete()
    assert len(driver.flights) == 1
    driver.complete()
    assert set(tickets) == set(driver.leases)
    assert driver.planner.counters.disk_loads == 1
    assert driver.planner.counters.disk_hits == 5


def test_a_host_victim_never_sits_in_a_slot() -> None:
    driver = Driver(Limits(2, 3))
    for number in (1, 2, 3):
        driver.use(number)  # 1 was demoted
    driver.acquire(4)
    read = driver.complete()
    assert (read.demote, read.drop) == ((), (key_of(1),))
    written = driver.complete()
    assert (written.demote, written.drop) == ((key_of(2),), ())


def test_slots_and_host_of_one_size_evict_from_both() -> None:
    driver = Driver(Limits(1, 1))
    driver.use(1)
    driver.acquire(2)
    (move,) = driver.flights.values()
    assert move.demote == move.drop == (key_of(1),)


def test_an_engine_may_have_less_room_than_was_known_when_the_planner_was_made() -> None:
    driver = Driver(Limits(2, 10), nbytes=lambda number: 4)
    driver.planner.limit_host(10)
    for number in range(4):
        driver.use(number)
    assert driver.host() == {"a2", "a3"}
    driver.nbytes = lambda number: 11
    assert isinstance(driver.refused[driver.acquire(9)], UnsupportedAdapterError)


def test_host_bytes_take_as_many_victims_as_needed() -> None:
    sizes = {1: 3, 2: 3, 3: 3, 4: 7}
    driver = Driver(Limits(4, 10, host_bytes=10), nbytes=sizes.__getitem__)
    for number in (1, 2, 3):
        driver.use(number)
    driver.acquire(4)
    (move,) = driver.flights.values()
    assert set(move.drop) == {key_of(1), key_of(2)}
    assert set(move.demote) == {key_of(1), key_of(2)}


def test_who_takes_less_than_charged_leaves_the_rest_to_others() -> None:
    driver = Driver(Limits(4, 10, host_bytes=10), nbytes=lambda number: 6)
    for number in (1, 2, 3):
        ticket = driver.acquire(number)
        driver.complete(taken=2)
        driver.complete()
        driver.release(ticket)
    assert driver.host() == {"a1", "a2", "a3"}
    assert driver.planner.residency.host.used_bytes == 6
    ticket = driver.acquire(4)
    driver.complete(taken=7)  # never more than it was charged: others have been let in since
    driver.release(ticket)
    assert driver.host() == {"a2", "a3", "a4"}
    assert driver.planner.residency.host.used_bytes == 10


def test_what_can_never_fit_is_refused_at_once() -> None:
    driver = Driver(Limits(2, 4, host_bytes=10), nbytes=lambda number: number)
    ticket = driver.acquire(11)
    assert isinstance(driver.refused[ticket], UnsupportedAdapterError)
    assert "raise host_bytes" in str(driver.refused[ticket])


def test_a_failed_load_costs_nobody_anything() -> None:
    driver = Driver(Limits(1, 1))
    driver.use(1)
    ticket = driver.acquire(2)
    driver.fail(message="broken file")
    assert "broken file" in str(driver.refused[ticket])
    assert driver.slots() == {"a1"}
    assert driver.granted[driver.acquire(1)].served_from is Tier.GPU


def test_a_failed_key_fails_fast_and_longer_each_time() -> None:
    driver = Driver(Limits(1, 2, retry_s=2.0, retry_max_s=5.0))
    waits = []
    for _ in range(4):
        driver.acquire(1)
        driver.fail()
        again = driver.refused[driver.acquire(1)]
        assert isinstance(again, LoadFailedError)
        assert not driver.flights
        waits.append(again.retry_after_s)
        driver.now += again.retry_after_s
    assert waits == [2.0, 4.0, 5.0, 5.0]
    driver.lease(1)


def test_a_failure_that_took_a_victim_rolls_forward() -> None:
    driver = Driver(Limits(1, 3))
    driver.use(1)
    driver.acquire(2)
    driver.complete()
    move = driver.flights.pop(min(driver.flights))
    driver.take(
        driver.planner.failed(move.op, LoadFailedError("half way"), 0.0, demoted=[key_of(1)])
    )
    assert driver.slots() == set()
    assert driver.host() == {"a1", "a2"}


def test_a_newcomer_that_left_host_memory_as_it_failed_is_loaded_anew() -> None:
    driver = Driver(Limits(1, 2, retry_s=1.0))
    driver.acquire(0, Want.STAGE)
    driver.complete()
    driver.acquire(0)
    driver.fail(lost=True)
    assert key_of(0) not in driver.planner.residency.host
    driver.now = 2.0
    driver.lease(0)
    assert driver.planner.counters.disk_hits == 1


def test_a_cancelled_wait_does_not_stop_the_load() -> None:
    driver = Driver(Limits(1, 2))
    ticket = driver.acquire(1)
    driver.cancel(ticket)
    driver.complete()
    assert driver.host() == {"a1"}
    assert not driver.flights, "nobody needs a slot for it"
    ticket = driver.acquire(1)
    driver.cancel(ticket)
    driver.complete()
    assert driver.slots() == {"a1"}
    assert not driver.leases


class TestFairness:
    def test_waiters_are_served_in_order(self) -> None:
        driver = Driver(Limits(1, 4))
        held = driver.lease(1)
        driver.acquire(2)
        driver.acquire(3)
        driver.release(held)
        assert driver.complete().load == key_of(2)

    def test_a_hit_overtakes_until_drain_after_s_then_the_victim_drains(self) -> None:
        driver = Driver(Limits(1, 4, drain_after_s=5.0))
        held = driver.lease(1)
        waiter = driver.acquire(2)
        driver.complete()
        driver.now = 4.9
        driver.take(driver.planner.tick(driver.now))
        overtaking = driver.acquire(1)
        assert overtaking in driver.leases
        assert driver.planner.next_deadline(driver.now) == 5.0
        driver.now = 5.0
        driver.take(driver.planner.tick(driver.now))
        late = driver.acquire(1)
        assert late in driver.waiting
        driver.release(held)
        driver.release(overtaking)
        driver.complete()
        assert waiter in driver.leases
        driver.release(waiter)
        driver.complete()
        assert late in driver.leases

    def test_a_drain_is_lifted_when_the_waiter_leaves(self) -> None:
        driver = Driver(Limits(1, 4, drain_after_s=1.0))
        driver.lease(1)
        waiter = driver.acquire(2)
        driver.complete()
        driver.now = 2.0
        driver.take(driver.planner.tick(driver.now))
        late = driver.acquire(1)
        assert late in driver.waiting
        driver.cancel(waiter)
        assert late in driver.leases


class TestPins:
    def test_a_pin_is_never_a_victim(self) -> None:
        driver = Driver(Limits(2, 4))
        driver.acquire(1, Want.PIN_GPU)
        driver.settle()
        for number in (2, 3, 4, 5):
            driver.use(number)
        assert "a1" in driver.slots()

    def test_one_slot_always_stays_unpinned(self) -> None:
        driver = Driver(Limits(2, 4))
        driver.acquire(1, Want.PIN_GPU)
        second = driver.acquire(2, Want.PIN_GPU)  # the first is still on its way, and counts
        assert isinstance(driver.refused[second], PinnedError)

    def test_a_failed_load_leaves_no_pin(self) -> None:
        driver = Driver(Limits(2, 4))
        driver.acquire(1, Want.PIN_GPU)
        driver.fail()
        driver.acquire(2, Want.PIN_GPU)
        driver.settle()
        assert driver.planner.residency.pins.gpu == {key_of(2)}

    def test_a_host_pin_gives_up_its_slot_but_not_its_memory(self) -> None:
        driver = Driver(Limits(1, 2))
        driver.acquire(1, Want.PIN_HOST)
        driver.complete()
        for number in (2, 3, 4):
            driver.use(number)
        assert driver.slots() == {"a4"}
        assert "a1" in driver.host()

    def test_an_unpinned_adapter_can_go(self) -> None:
        driver = Driver(Limits(2, 2))
        driver.acquire(1, Want.PIN_GPU)
        driver.settle()
        driver.take(driver.planner.unpin(key_of(1), 0.0))
        driver.use(2)
        driver.use(3)
        assert "a1" not in driver.host()


class TestUnload:
    def test_it_drains_first_and_latecomers_load_anew(self) -> None:
        driver = Driver(Limits(2, 4))
        held = driver.lease(1)
        unload = driver.unload(1)
        late = driver.acquire(1)
        assert late in driver.waiting
        assert not driver.flights
        driver.release(held)
        move = driver.complete()
        assert move.load is None
        assert move.drop == (key_of(1),)
        assert unload in driver.granted
        driver.settle()
        assert driver.granted[late].served_from is Tier.DISK

    def test_a_pinned_adapter_is_refused(self) -> None:
        driver = Driver(Limits(2, 4))
        driver.acquire(1, Want.PIN_GPU)
        driver.settle()
        assert isinstance(driver.refused[driver.unload(1)], PinnedError)

    def test_giving_up_the_wait_lets_the_adapter_live(self) -> None:
        driver = Driver(Limits(2, 4))
        held = driver.lease(1)
        driver.cancel(driver.unload(1))
        assert driver.acquire(1) in driver.leases
        driver.release(held)
        assert driver.slots() == {"a1"}

    def test_what_is_not_resident_is_gone_already(self) -> None:
        driver = Driver(Limits(2, 4))
        assert driver.unload(1) in driver.granted


class TestStaging:
    def test_host_memory_only(self) -> None:
        driver = Driver(Limits(1, 3))
        driver.acquire(1, Want.STAGE)
        driver.complete()
        assert driver.slots() == set()
        assert driver.granted[driver.lease(1)].served_from is Tier.HOST

    def test_through_an_idle_slot_where_the_engine_cannot_do_better(self) -> None:
        driver = Driver(Limits(1, 3, stages_without_slot=False))
        driver.use(1)
        driver.acquire(2, Want.STAGE)
        driver.complete()
        assert driver.host() == {"a1", "a2"}

    def test_never_waits_for_a_slot(self) -> None:
        driver = Driver(Limits(1, 3, stages_without_slot=False))
        driver.lease(1)
        assert isinstance(driver.refused[driver.acquire(2, Want.STAGE)], NoRoomError)

    def test_goes_on_while_others_wait_for_slots(self) -> None:
        driver = Driver(Limits(1, 4))
        driver.lease(1)
        driver.acquire(2)
        staged = driver.acquire(3, Want.STAGE)
        driver.settle()
        assert staged in driver.granted


class TestReconcile:
    def test_agreement_is_no_drift(self) -> None:
        driver = Driver(Limits(1, 2))
        driver.use(1)
        truth = Holdings({0: key_of(1)}, frozenset({key_of(1)}))
        driver.take(driver.planner.reconcile(truth, 0.0))
        assert driver.planner.counters.drift == 0

    def test_a_lost_leased_copy_is_brought_back_first(self) -> None:
        driver = Driver(Limits(2, 4))
        driver.lease(1)
        driver.lease(2)
        driver.acquire(3)
        truth = Holdings({1: key_of(2)}, frozenset({key_of(2)}))
        driver.take(driver.planner.reconcile(truth, 0.0))
        assert driver.planner.counters.drift == 2
        assert driver.complete().to is Tier.HOST, "the newcomer is read meanwhile"
        assert driver.complete().load == key_of(1)
        assert driver.slots() == {"a1", "a2"}

    def test_strangers_are_dropped(self) -> None:
        driver = Driver(Limits(2, 4))
        truth = Holdings({}, frozenset({key_of(9)}))
        driver.take(driver.planner.reconcile(truth, 0.0))
        assert driver.complete().drop == (key_of(9),)


def test_states_move_only_along_the_table() -> None:
    for state in CopyState:
        for to in CopyState:
            copy = Copy(key_of(1), Tier.GPU, 1, 0.0, state)
            if to in TRANSITIONS[state]:
                copy.move(to, 1.0)
                assert copy.state is to
            else:
                with pytest.raises(IllegalTransitionError):
                    copy.move(to, 1.0)
