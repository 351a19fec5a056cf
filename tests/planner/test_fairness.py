"""Invariant 10 in numbers: how long anybody can wait, whatever the others do.

A discrete-event simulation with hostile traffic: every adapter is asked for again at once, so
each resident one has always leases and, without draining, nobody else would ever get in.
"""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_cache.planner import Limits, Transition
from lora_cache.state import CopyState, Tier
from tests.planner.driver import Driver

DRAIN_AFTER_S, LONGEST_S = 2.0, 3.0
READ_S, WRITE_S = 0.1875, 0.0625
LOAD_S = READ_S + WRITE_S


#: Found by chance: the load of the oldest waiter took the host copy of the next one, and while
#: that was moving, a younger one took the slot that came free.
OVERTAKEN = [
    (0.25, 3, 1.0), (0.25, 5, 2.0), (0.25, 0, 2.0), (0.25, 1, 1.0), (0.25, 0, 3.0), (0.25, 5, 1.0),
    (0.25, 0, 2.5), (0.25, 3, 1.0), (0.25, 0, 2.0), (0.125, 0, 1.0), (0.25, 0, 1.0), (0.25, 2, 1.0),
    (0.125, 0, 2.0), (0.25, 1, 1.0), (0.125, 1, 1.0), (0.125, 0, 1.0), (0.25, 4, 0.5),
    (0.375, 0, 1.0), (0.25, 0, 3.0), (0.125, 0, 1.0), (0.25, 5, 1.0), (0.25, 0, 1.0),
    (0.25, 4, 1.0),
    (0.25, 2, 2.0), (0.25, 0, 2.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 3, 1.0),
    (0.25, 4, 3.0), (0.25, 0, 3.0),
]  # fmt: skip


#: The load of an older waiter took the host copy of the only overdue one.  That one did not count
#: while it was moving: the drain for it was lifted, and the victim had time for a new lease.
LIFTED = [
    (0.25, 0, 1.0), (0.25, 3, 0.5), (0.25, 4, 3.0), (0.25, 1, 2.0), (0.25, 5, 1.0), (0.25, 2, 3.0),
    (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 1, 1.0), (0.125, 0, 1.0), (0.25, 0, 1.0),
    (0.125, 0, 1.0), (0.25, 3, 1.0), (0.25, 1, 3.0), (0.25, 0, 3.0), (0.25, 0, 1.0), (0.25, 0, 1.0),
    (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 1, 1.0), (0.25, 0, 2.0), (0.25, 0, 1.0),
    (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 5, 1.0), (0.25, 0, 2.0), (0.25, 2, 1.0),
]  # fmt: skip

#: Each load takes the host copy of the next in line, so they run one after the other though the
#: engine could run them together: the longest wait that there can be, but for the gaps.
CHAIN = [
    (0.25, 4, 3.0), (0.25, 3, 0.25), (0.25, 0, 0.25), (0.25, 1, 0.25), (0.25, 2, 0.25),
    (0.5, 0, 0.25), (0.01, 1, 3.0), (0.01, 2, 3.0),
    (0.01, 5, 3.0), (0.01, 4, 3.0), (0.01, 3, 3.0),
    (1.9, 0, 3.0), (0.01, 1, 3.0), (0.01, 2, 3.0),
]  # fmt: skip

#: Host memory was too full to read the second one ahead.  When it was at last, it did not count:
#: the slot that had been set aside for it took new leases.
READ_LATE = [
    (0.25, 0, 1.0), (0.25, 2, 1.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 1, 1.0), (0.25, 3, 1.0),
    (0.25, 2, 1.0), (0.25, 0, 3.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 0, 1.0),
    (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 0, 2.0), (0.25, 0, 1.0), (0.25, 0, 1.0), (0.25, 0, 1.0),
    (0.25, 1, 3.0), (0.25, 0, 3.0),
]  # fmt: skip


def seconds(driver: Driver, move: Transition) -> float:
    """Of a load; both steps of one from disk take the longest together."""
    held = driver.planner.residency.host.copies.get(move.load) if move.load else None
    reads = held is not None and held.state is CopyState.LOADING
    return READ_S * reads + WRITE_S * (move.to is Tier.GPU)


quarters = st.integers(1, 12).map(lambda number: number / 4)  # so that much happens at once


@pytest.mark.parametrize("max_in_flight", [None, 1], ids=["concurrent", "serial"])
@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    spare=st.integers(0, 4),
    arrivals=st.lists(
        st.tuples(
            st.floats(0.01, 0.4) | st.just(0.25),
            st.integers(0, 5),
            st.floats(0.05, LONGEST_S) | quarters,
        ),
        min_size=20,
        max_size=120,
    ),
)
@example(slots=3, spare=2, arrivals=OVERTAKEN)
@example(slots=3, spare=2, arrivals=LIFTED)
@example(slots=3, spare=2, arrivals=CHAIN)
@example(slots=2, spare=1, arrivals=READ_LATE)
def test_everyone_is_admitted_in_time(
    max_in_flight: int | None, slots: int, spare: int, arrivals: list[tuple[float, int, float]]
) -> None:
    """Wait ≤ drain_after + ⌈place in the line / slots⌉ · longest lease + place · longest load.

    Whether or not the engine can load several adapters at once: see docs/concepts.md.
    """
    driver = Driver(
        Limits(slots, slots + spare, drain_after_s=DRAIN_AFTER_S, max_in_flight=max_in_flight)
    )
    events: list[tuple[float, int, str, int]] = []
    order, now = 0, 0.0
    for gap, number, _ in arrivals:
        now += gap
        order += 1
        heapq.heappush(events, (now, order, "arrive", number))
    lengths = [length for *_, length in arrivals]
    asked: dict[int, tuple[float, int]] = {}
    leased: set[int] = set()
    flying: set[int] = set()

    while events:
        driver.now, _, kind, subject = heapq.heappop(events)
        if kind == "arrive":
            line = {demand.key for demand in driver.planner.waiting}
            line |= {move.load for move in driver.flights.values() if move.load}
            asked[driver.acquire(subject)] = (driver.now, len(line) + 1)
        elif kind == "loaded":
            driver.complete(subject)
        elif kind == "done":
            driver.release(subject)
        else:
            driver.take(driver.planner.tick(driver.now))
        for ticket in set(driver.leases) - leased:
            came, place = asked[ticket]
            rounds = math.ceil(place / slots)
            bound = DRAIN_AFTER_S + rounds * LONGEST_S + place * LOAD_S
            assert driver.now - came <= bound + 1e-6, (driver.now - came, bound, place)
            order += 1
            length = lengths[ticket % len(lengths)]
            heapq.heappush(events, (driver.now + length, order, "done", ticket))
        leased |= set(driver.leases)
        for op in set(driver.flights) - flying:
            order += 1
            takes_s = seconds(driver, driver.flights[op])
            heapq.heappush(events, (driver.now + takes_s, order, "loaded", op))
        flying |= set(driver.flights)
        deadline = driver.planner.next_deadline(driver.now)
        if deadline is not None:
            order += 1
            heapq.heappush(events, (deadline, order, "tick", 0))
    assert leased == set(asked), "somebody was never admitted"
