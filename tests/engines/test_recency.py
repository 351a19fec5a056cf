"""The mirror of vLLM's slot LRU against a reference that knows the exact order.

The adversary is everything that the manager cannot see: when a step touches an adapter that is
in use, and when, between being sent and being answered, a command takes effect.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cache.adapter import AdapterKey
from lora_cache.engines.recency import SlotMirror
from tests.planner.driver import key_of

T = TypeVar("T")
KEYS = [key_of(number) for number in range(6)]


class ReferenceLRU:
    """vLLM's slots: the exact order of touches, and the table of indexes."""

    def __init__(self, slots: int) -> None:
        self.table: list[AdapterKey | None] = [None] * slots
        self.order: OrderedDict[AdapterKey, None] = OrderedDict()

    def touch(self, key: AdapterKey) -> None:
        if key in self.order:
            self.order.move_to_end(key)

    def add(self, key: AdapterKey) -> AdapterKey | None:
        """Give `key` a slot; returns whom it cost theirs."""
        evicted = None
        if None not in self.table:
            evicted = next(iter(self.order))
            self.remove(evicted)
        self.table[self.table.index(None)] = key
        self.order[key] = None
        return evicted

    def remove(self, key: AdapterKey) -> None:
        if key in self.order:
            del self.order[key]
            self.table[self.table.index(key)] = None

    def slots(self) -> dict[int, AdapterKey]:
        return {index: key for index, key in enumerate(self.table) if key is not None}

    def oldest_after(self, touches: list[AdapterKey]) -> AdapterKey:
        order = self.order.copy()
        for key in touches:
            order.move_to_end(key)
        return next(iter(order))


@dataclass
class Request:
    key: AdapterKey
    sent: int
    ran: bool = False


@dataclass
class Flight:
    """A command, or a transition of several, that was sent and is not answered yet."""

    sent: int
    touch: list[AdapterKey]
    newcomer: AdapterKey | None = None
    victim: AdapterKey | None = None
    done: int = 0  # touches that have taken effect
    added: bool = False


class Pick(Protocol):
    def __call__(self, options: Sequence[T], /) -> T: ...


class World:
    """A manager, a vLLM and their traffic; what happens next is for `pick` to say."""

    def __init__(self, slots: int, pick: Pick) -> None:
        self.mirror = SlotMirror(slots)
        self.vllm = ReferenceLRU(slots)
        self.uses: Counter[AdapterKey] = Counter()
        self.requests: list[Request] = []
        self.flight: Flight | None = None
        self.pick = pick
        self.evictions = 0

    def idle(self) -> list[AdapterKey]:
        """Resident, and nobody's requests can touch it."""
        return [key for key in self.vllm.order if not self.uses[key]]

    def happen(self) -> None:
        """Anything that can happen now happens."""
        events = [self.begin_use] if self.uses.total() < 3 else []
        if +self.uses:
            events += [self.end_use, self.send_request, self.adversary_touches]
        if self.requests:
            events += [self.step, self.see_output]
        if self.flight is None:
            events += [self.send_newcomer] * 3 + [self.send_touch]
            events += [self.remove] if self.pick(range(8)) == 0 else []
        else:
            events += [self.progress, self.progress, self.answer]
            events += [self.fail] if self.pick(range(4)) == 0 else []
        self.pick(events)()
        self.check()

    # -------------------------------------------------------------- requests

    def begin_use(self) -> None:
        flight = self.flight
        reserved = flight and {flight.victim, flight.newcomer}
        usable = [key for key in self.mirror.slots().values() if key not in (reserved or ())]
        if usable:
            key = self.pick(usable)
            self.uses[key] += 1
            self.mirror.begin_use(key)

    def end_use(self) -> None:
        key = self.pick(list(+self.uses))
        self.uses[key] -= 1
        if not self.uses[key]:
            self.requests = [request for request in self.requests if request.key != key]
        self.mirror.end_use(key)

    def send_request(self) -> None:
        self.requests.append(Request(self.pick(list(+self.uses)), self.mirror.event()))

    def step(self) -> None:
        request = self.pick(self.requests)
        if request.key in self.vllm.order:
            self.vllm.touch(request.key)
            request.ran = True

    def see_output(self) -> None:
        """Of a step that may have been long ago."""
        request = self.pick(self.requests)
        if request.ran:
            self.mirror.ran(request.key, request.sent)

    def adversary_touches(self) -> None:
        self.vllm.touch(self.pick(list(+self.uses)))

    # -------------------------------------------------------------- commands

    def send_touch(self) -> None:
        if self.vllm.order:
            self.flight = Flight(self.mirror.event(), [self.pick(list(self.vllm.order))])

    def send_newcomer(self) -> None:
        victim = None
        if self.mirror.is_full:
            if not self.idle():
                return
            victim = self.pick(self.idle())
        newcomer = self.pick([key for key in KEYS if key not in self.vllm.order])
        touch = self.mirror.older_than(victim) if victim else []
        self.flight = Flight(self.mirror.event(), touch, newcomer, victim)

    def progress(self) -> None:
        """The engine gets one command further."""
        flight = self.flight
        assert flight is not None
        if flight.done < len(flight.touch):
            self.vllm.touch(flight.touch[flight.done])
            flight.done += 1
        elif flight.newcomer is not None and not flight.added:
            flight.added = True
            assert self.vllm.add(flight.newcomer) == flight.victim
            self.evictions += flight.victim is not None

    def answer(self) -> None:
        flight = self._answer_touches()
        if flight.newcomer is not None:
            if not flight.added:
                assert self.vllm.add(flight.newcomer) == flight.victim
            self.mirror.activated(flight.newcomer, flight.victim, flight.sent)

    def fail(self) -> None:
        """A newcomer, before or after it took its slot: the manager removes what is left."""
        flight = self._answer_touches()
        if flight.added and flight.newcomer is not None:
            self.vllm.remove(flight.newcomer)
            if flight.victim is not None:
                self.mirror.removed(flight.victim)

    def _answer_touches(self) -> Flight:
        flight, self.flight = self.flight, None
        assert flight is not None
        for key in flight.touch[flight.done :]:
            self.vllm.touch(key)
        for key in flight.touch:
            self.mirror.touched(key, flight.sent)
        return flight

    def remove(self) -> None:
        key = self.pick(KEYS)
        self.vllm.remove(key)
        self.mirror.removed(key)

    # -------------------------------------------------------------- what must hold

    def check(self) -> None:
        if self.flight is not None:
            return
        assert self.mirror.slots() == self.vllm.slots()
        assert self.mirror.is_full == (None not in self.vllm.table)
        assert [key in self.mirror for key in KEYS] == [key in self.vllm.order for key in KEYS]
        for victim in self.idle():
            touches = self.mirror.older_than(victim)
            assert victim not in touches
            assert len(set(touches)) == len(touches)
            assert self.vllm.oldest_after(touches) == victim


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_any_idle_adapter_can_be_made_the_oldest_in_random_traffic(slots: int) -> None:
    evictions = 0
    for seed in range(25):
        world = World(slots, Random(seed).choice)
        for _ in range(400):
            world.happen()
        evictions += world.evictions
    assert evictions > 100, "there was something to see"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slots=st.integers(1, 3), steps=st.integers(1, 40), data=st.data())
def test_any_idle_adapter_can_be_made_the_oldest_whatever_hypothesis_tries(
    slots: int, steps: int, data: st.DataObject
) -> None:
    def pick(options: Sequence[T]) -> T:
        return options[data.draw(st.integers(0, len(options) - 1))]

    world = World(slots, pick)
    for _ in range(steps):
        world.happen()


# ---------------------------------------------------------------------------- how few touches


def load(mirror: SlotMirror, key: AdapterKey, victim: AdapterKey | None = None) -> None:
    sent = mirror.event()
    mirror.activated(key, victim, sent)


def use(mirror: SlotMirror, key: AdapterKey) -> None:
    """A whole lease, with one request that is seen to run."""
    mirror.begin_use(key)
    sent = mirror.event()
    mirror.ran(key, sent)
    mirror.end_use(key)


@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 4), numbers=st.lists(st.integers(0, 5), max_size=40))
def test_sequential_use_under_lru_needs_no_touches(slots: int, numbers: list[int]) -> None:
    mirror, vllm = SlotMirror(slots), ReferenceLRU(slots)
    for number in numbers:
        key = KEYS[number]
        if key not in mirror:
            victim = next(iter(vllm.order)) if mirror.is_full else None
            assert victim is None or mirror.older_than(victim) == []
            assert vllm.add(key) == victim
            load(mirror, key, victim)
        use(mirror, key)
        vllm.touch(key)
        assert mirror.slots() == vllm.slots()


def test_only_what_may_be_older_is_touched() -> None:
    mirror = SlotMirror(4)
    for key in KEYS[:4]:
        load(mirror, key)
    assert mirror.older_than(KEYS[0]) == []
    assert mirror.older_than(KEYS[2]) == KEYS[:2]
    use(mirror, KEYS[0])
    assert mirror.older_than(KEYS[2]) == [KEYS[1]]
    assert set(mirror.older_than(KEYS[0])) == set(KEYS[1:4])


def test_a_touch_is_as_good_as_a_use() -> None:
    mirror = SlotMirror(2)
    load(mirror, KEYS[0])
    load(mirror, KEYS[1])
    mirror.touched(KEYS[0], mirror.event())
    assert mirror.older_than(KEYS[1]) == []
    assert mirror.older_than(KEYS[0]) == [KEYS[1]]


def test_late_output_of_an_early_request_takes_nothing_back() -> None:
    mirror = SlotMirror(2)
    load(mirror, KEYS[0])
    mirror.begin_use(KEYS[0])
    early = mirror.event()
    load(mirror, KEYS[1])
    late = mirror.event()
    mirror.ran(KEYS[0], late)
    mirror.ran(KEYS[0], early)
    assert mirror.older_than(KEYS[1]) == []


def test_a_lease_without_a_request_makes_nothing_newer() -> None:
    mirror = SlotMirror(2)
    load(mirror, KEYS[0])
    load(mirror, KEYS[1])
    mirror.begin_use(KEYS[0])
    mirror.end_use(KEYS[0])
    assert mirror.older_than(KEYS[0]) == [KEYS[1]], "it may have been touched"
    assert mirror.older_than(KEYS[1]) == [KEYS[0]], "it may not have been"


def test_whatever_is_in_use_may_be_newer_than_everything() -> None:
    mirror = SlotMirror(3)
    for key in KEYS[:3]:
        load(mirror, key)
    mirror.begin_use(KEYS[0])
    mirror.begin_use(KEYS[0])
    mirror.end_use(KEYS[0])
    use(mirror, KEYS[2])
    assert mirror.older_than(KEYS[0]) == KEYS[1:3], "one user is still there"


# ---------------------------------------------------------------------------- slots


def test_a_newcomer_takes_the_lowest_free_slot_or_that_of_its_victim() -> None:
    mirror = SlotMirror(3)
    for key in KEYS[:3]:
        assert not mirror.is_full
        load(mirror, key)
    assert mirror.is_full
    load(mirror, KEYS[3], KEYS[1])
    assert mirror.slots() == {0: KEYS[0], 1: KEYS[3], 2: KEYS[2]}
    mirror.removed(KEYS[2])
    mirror.removed(KEYS[0])
    assert mirror.slots() == {1: KEYS[3]}
    load(mirror, KEYS[4])
    load(mirror, KEYS[5])
    assert mirror.slots() == {0: KEYS[4], 1: KEYS[3], 2: KEYS[5]}


def test_what_is_in_no_slot_is_no_victim_and_can_be_removed() -> None:
    mirror = SlotMirror(1)
    mirror.removed(KEYS[0])
    assert KEYS[0] not in mirror
    with pytest.raises(KeyError, match="in no slot"):
        mirror.older_than(KEYS[0])


def test_events_of_what_left_its_slot_are_harmless() -> None:
    mirror = SlotMirror(1)
    load(mirror, KEYS[0])
    mirror.begin_use(KEYS[0])
    sent = mirror.event()
    mirror.removed(KEYS[0])
    mirror.ran(KEYS[0], sent)
    mirror.touched(KEYS[0], sent)
    mirror.end_use(KEYS[0])
    assert mirror.slots() == {}
