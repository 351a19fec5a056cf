"""Hypothesis drives the planner through every event there is, in any order.

After each one `Planner.check` asserts invariants 1, 2, 6, 7 and 9 (leases are counted twice,
here and there); rules assert 5 (a failed load evicts nobody) and that nobody is forgotten.  Memory
grows scarce and eases at any time: what is idle then leaves down to the budget (`Driver.take`),
the budget shrinks no more often than it may, and is back when it is over.
"""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_cache.errors import MemoryPressureError
from lora_cache.level import Level
from lora_cache.planner import Holdings, Limits, Want
from lora_cache.policies import FIFO, GDSF, LFU, LRU, LRUK, SLRU, Sieve
from lora_cache.state import CopyState
from lora_cache.testing import RandomPolicy
from tests.planner.driver import Driver, key_of

ADAPTERS = st.integers(0, 7)
LEVELS = st.sampled_from(Level)
POLICIES = st.sampled_from(
    [LRU, LFU, lambda: LFU(math.inf), FIFO, GDSF, LRUK, SLRU, Sieve, lambda: RandomPolicy(seed=7)]
)


class PlannerMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 3),
        spare=st.integers(0, 3),
        host_bytes=st.sampled_from([None, 6, 12]),
        stages=st.booleans(),
        max_in_flight=st.sampled_from([None, 1]),
        max_speculative=st.sampled_from([None, 1, 2]),
        gpu_policy=POLICIES,
        host_policy=POLICIES,
    )
    def start(  # type: ignore[no-untyped-def]
        self,
        slots,
        spare,
        host_bytes,
        stages,
        max_in_flight,
        max_speculative,
        gpu_policy,
        host_policy,
    ):
        limits = Limits(
            slots,
            slots + spare,
            host_bytes,
            stages_without_slot=stages,
            max_in_flight=max_in_flight,
            max_speculative=max_speculative,
            drain_after_s=5.0,
            retry_s=2.0,
            shrink_every_s=4.0,
        )
        self.driver = Driver(limits, gpu_policy, host_policy, nbytes=lambda number: 1 + number % 4)

    @rule(number=ADAPTERS, want=st.sampled_from([Want.LEASE, Want.LEASE, *Want]))
    def acquire(self, number: int, want: Want) -> None:
        self.driver.acquire(number, want)

    @precondition(lambda self: self.driver.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.driver.release(data.draw(st.sampled_from(sorted(self.driver.leases))))

    @precondition(lambda self: self.driver.waiting or self.driver.unloads)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        tickets = [*self.driver.waiting, *self.driver.unloads]
        self.driver.cancel(data.draw(st.sampled_from(sorted(tickets))))

    @rule(number=ADAPTERS)
    def unpin(self, number: int) -> None:
        self.driver.take(self.driver.planner.unpin(key_of(number), self.driver.now))

    @rule(number=ADAPTERS)
    def unload(self, number: int) -> None:
        self.driver.unload(number)

    @precondition(lambda self: self.driver.flights)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(sorted(self.driver.flights)))
        taken = data.draw(st.sampled_from([None, 1, 2, 9]))
        table = self.driver.planner.residency
        charged = {copy.key: copy.nbytes for copy in table.host}
        arrives = {copy.key for copy in table.host if copy.state is CopyState.LOADING}
        move = self.driver.complete(op, taken)
        if move.load is not None:
            assert (table.gpu if move.to == "gpu" else table.host).get(move.load) is not None
            if taken is not None and move.load in arrives:
                charged[move.load] = min(charged[move.load], taken)
            assert table.host.copies[move.load].nbytes == charged[move.load]

    @precondition(lambda self: self.driver.flights)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(sorted(self.driver.flights)))
        residency = self.driver.planner.residency
        before = {copy.key for copy in residency.host if copy.state is not CopyState.LOADING}
        slots = {copy.key for copy in residency.gpu if copy.state is not CopyState.LOADING}
        lost = data.draw(st.booleans())
        move = self.driver.fail(op, lost=lost)
        if lost and move.load in before:
            before.remove(move.load)
            assert move.load not in residency.host
        assert before <= {copy.key for copy in residency.host}, "invariant 5"
        assert slots <= {copy.key for copy in residency.gpu}, "invariant 5"

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.driver.now += seconds
        self.driver.take(self.driver.planner.tick(self.driver.now))

    @rule(host=LEVELS, gpu=LEVELS)
    def press(self, host: Level, gpu: Level) -> None:
        kept = set(self.driver.planner.residency.pins.host)
        before = self.budget
        self.driver.press(host, gpu)
        assert kept <= self.driver.planner.residency.pins.host, "a pin that exists stays"
        if host is Level.NONE:
            assert self.budget is None, "it is all back"
        elif host is Level.SOFT:
            assert self.budget == before

    @rule(number=ADAPTERS, want=st.sampled_from([Want.STAGE, Want.PIN_HOST, Want.PIN_GPU]))
    def ask_for_what_is_optional(self, number: int, want: Want) -> None:
        """While memory is scarce nothing is begun for it."""
        planner, key = self.driver.planner, key_of(number)
        squeeze, pins = planner.squeeze, planner.residency.pins
        held = {copy.key for copy in planner.residency.host}
        pinned = key in pins.gpu or (want is Want.PIN_HOST and key in pins.host)
        ticket = self.driver.acquire(number, want)
        if want is Want.STAGE:
            if not squeeze.speculates and key not in held:
                assert all(move.load != key for move in self.driver.flights.values())
        elif (squeeze.host or (squeeze.gpu and want is Want.PIN_GPU)) and not pinned:
            assert isinstance(self.driver.refused[ticket], MemoryPressureError)

    @property
    def budget(self) -> int | None:
        return self.driver.budgets[-1][1] if self.driver.budgets else None

    @invariant()
    def the_budget_does_not_flap(self) -> None:
        """It shrinks at most once in `shrink_every_s`, and grows only when pressure is over."""
        changes = self.driver.budgets
        shrinks = [at for at, budget in changes if budget is not None]
        assert all(b - a >= 4.0 for a, b in pairwise(shrinks))
        for (_, before), (_, after) in pairwise(changes):
            assert after is None or before is None or after < before
        assert self.budget is None or self.driver.planner.squeeze.host is not Level.NONE

    @rule(lost=ADAPTERS, stranger=st.sampled_from([None, 90]), from_host=st.booleans())
    def drift(self, lost: int, stranger: int | None, from_host: bool) -> None:
        """The engine lost one copy and holds one that nobody asked for.

        It has not begun what is in flight: victims are still there, newcomers are not yet.
        """
        planner = self.driver.planner
        residency, key = planner.residency, key_of(lost)
        if residency.is_moving(key):
            return
        loading = CopyState.LOADING
        slots = [c.key for c in residency.gpu if c.key != key and c.state is not loading]
        held = {c.key for c in residency.host if c.state is not loading}
        expected = (key in residency.gpu) + (from_host and key in residency.host)
        if from_host:
            held.discard(key)
        dropping = {k for move in self.driver.flights.values() for k in move.drop}
        if stranger is not None:
            held.add(key_of(stranger))
            expected += key_of(stranger) not in dropping
        before = planner.counters.drift
        truth = Holdings(dict(enumerate(slots)), frozenset(held))
        self.driver.take(planner.reconcile(truth, self.driver.now))
        assert planner.counters.drift - before == expected

    @invariant()
    def no_slot_is_withheld(self) -> None:
        """While host memory has room, whoever waits does so because every slot is in use."""
        planner = self.driver.planner
        residency = planner.residency
        gpu, host = residency.gpu, residency.host
        waiting = [
            demand
            for demand in planner.waiting
            if not residency.is_moving(demand.key) and demand.key not in residency.unloading
        ]
        if planner.limits.max_in_flight and planner.in_flight:
            return
        if any(move.load is None for move in self.driver.flights.values()):
            return  # the host copy of the oldest waiter may be leaving; it comes first all the same
        if not waiting or any(demand.repair for demand in planner.waiting):
            return
        if host.max_bytes is not None or host.used_entries == host.max_entries:
            return
        in_use = {*residency.leases, *residency.pins.gpu, *residency.unloading}
        assert gpu.used_entries == gpu.max_entries
        assert all(slot.op or slot.key in in_use for slot in gpu)

    def teardown(self) -> None:
        """Let everything end: nobody may be left waiting, and nothing may be left behind."""
        driver = getattr(self, "driver", None)
        if driver is None:
            return
        driver.press(gpu=Level.NONE)
        assert driver.planner.residency.host.target is None
        for number in range(8):
            driver.take(driver.planner.unpin(key_of(number), driver.now))
        for _ in range(300):
            if driver.flights:
                driver.complete()
            elif driver.leases:
                driver.release(min(driver.leases))
            else:
                break
        assert not driver.waiting, "somebody waits for ever"
        assert not driver.unloads
        assert not driver.planner.residency.draining()


PlannerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    phases=(Phase.reuse, Phase.generate, Phase.shrink),  # "explain" traces every line: minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPlannerMachine = PlannerMachine.TestCase
