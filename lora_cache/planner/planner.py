"""The one brain: events in, actions out.  No I/O, no clock, no torch, no threads.

Every public method is an event; it returns the actions that follow from it, in order.  What an
action needs from the engine comes back as another event (`completed`, `failed`).  Time is an
argument.  The driver may therefore be an event loop, a trace replay or a property test.

How room is made: the slot tier and the host tier each rank victims by their own policy; what is
leased, pinned, moving or (for host) in a slot is skipped, victims are taken until the newcomer
fits, and all of it is set aside in one transition, or nothing (`residency.py`).  What is on disk is
read before it takes a slot, where that is possible: two transitions (`arrivals.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from lora_cache.errors import LoraCacheError
from lora_cache.key import AdapterKey
from lora_cache.level import Level
from lora_cache.planner.actions import (
    Action,
    Holdings,
    Limits,
    Refused,
    Start,
    Transition,
    Want,
    make_granted,
)
from lora_cache.planner.arrivals import Arrivals
from lora_cache.planner.failures import again
from lora_cache.planner.invariants import check_invariants
from lora_cache.planner.waiting import Ticket
from lora_cache.policies import Policy, RemovalReason
from lora_cache.state import CopyState, Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_GPU, _HOST, _DISK = Tier
_LEASE, _STAGE = Want.LEASE, Want.STAGE
_EVICTED, _REMOVED = RemovalReason
_READY = CopyState.READY


class Planner(Arrivals):
    """Decides which adapter is in which tier.

    Not thread-safe: one caller at a time.  Tickets are numbers that the caller makes up; each is
    used once.  A ticket ends by `Refused`, by `cancel`, or, if it was granted a lease, by
    `release`.

    Args:
        explains: give a reason for each victim (`Start.choices`).
    """

    def __init__(
        self, limits: Limits, gpu_policy: Policy, host_policy: Policy, *, explains: bool = False
    ) -> None:
        super().__init__(limits, gpu_policy, host_policy, explains)
        # False until there is something to refuse a lease for: a budget of bytes, a failed load.
        self._may_refuse = limits.host_bytes is not None

    def limit_host(self, nbytes: int) -> None:
        """The engine has room for so many bytes in host memory; said before anything is there."""
        self.limits = replace(self.limits, host_bytes=nbytes)
        self.residency.host.max_bytes = nbytes
        self._may_refuse = True

    # ------------------------------------------------------------------ events: callers

    def acquire(
        self, ticket: int, key: AdapterKey, nbytes: int, now: float, want: Want = Want.LEASE
    ) -> list[Action]:
        """A caller wants `key`; the ticket is granted now, later, or refused.

        Args:
            nbytes: what a copy of `key` is charged in host memory, in bytes.
        """
        residency = self.residency
        slot = residency.gpu.get(key)
        if slot and slot.state is _READY and want is _LEASE:  # the hot path
            self._held[ticket] = key
            residency.add_lease(key, now)
            self.counters.slot_hits += 1
            return [make_granted((ticket, _GPU))]
        start = self._ask(Ticket(ticket, key, nbytes, want, now), now)
        return [start] if start else self._take_actions()

    def cancel(self, ticket: int, now: float) -> list[Action]:
        """The caller does not wait any more.  A load that is under way runs to its end."""
        self.residency.pins.withdraw(ticket)
        self._speculation.withdraw(ticket)
        if request := self.waiting.tickets.get(ticket):
            self.waiting.leave(request)
            self._pump(now)
        for flight in self._flights.values():
            flight.tickets.pop(ticket, None)
        for key, tickets in list(self.residency.unloading.items()):
            if ticket in tickets:
                tickets.remove(ticket)
                self._advance_unload(key, now)
                self._pump(now)
        return self._take_actions()

    def release(self, ticket: int, now: float) -> list[Action]:
        """A granted lease ends.  Unknown tickets (released already) are ignored."""
        key = self._held.pop(ticket, None)
        if key is not None and self.residency.drop_lease(key):
            if self.waiting.demands:
                self._repair(key)
                self._advance_unload(key, now)
                self._pump(now)
            elif self.residency.unloading:
                self._advance_unload(key, now)
            else:  # the hot path
                return []
        return self._take_actions()

    def unpin(self, key: AdapterKey, now: float) -> list[Action]:
        """Withdraw the pins of `key`, in whatever tier; none is fine."""
        self.residency.pins.remove(key)
        self._repair(key)
        self._pump(now)
        return self._take_actions()

    def unload(self, ticket: int, key: AdapterKey, now: float) -> list[Action]:
        """Drain `key`, then drop it from host and GPU; granted when it is gone."""
        self.residency.unloading.setdefault(key, []).append(ticket)
        self._advance_unload(key, now)
        return self._take_actions()

    def tick(self, now: float) -> list[Action]:
        """Time has passed; see `next_deadline`."""
        self._pump(now)
        return self._take_actions()

    def press(self, host: Level, gpu: Level, now: float) -> list[Action]:
        """Memory is as scarce as this now; `Squeeze` says what that changes.

        Args:
            gpu: the highest level of the engine's GPUs.
        """
        self.squeeze.press(host, gpu)
        self._pump(now)
        return self._take_actions()

    @property
    def awaits_tick(self) -> bool:
        """There may be a `next_deadline`."""
        return bool(self.waiting.demands) or self.squeeze.active

    def next_deadline(self, now: float) -> float | None:
        """When `tick` must be called next.

        Somebody will have waited too long by then, or scarce memory asks for the next step.
        """
        due = self._next_overdue(now), self.squeeze.deadline(now)
        return min((at for at in due if at is not None), default=None)

    # ------------------------------------------------------------------ events: the engine

    def completed(
        self, op: int, cost_s: float, now: float, nbytes: int | None = None
    ) -> list[Action]:
        """The engine carried out transition `op`, in `cost_s` seconds.

        Args:
            nbytes: what the newcomer takes in host memory, if it is less than it was charged.
        """
        flight = self._flights.pop(op)
        move, counters, residency = flight.move, self.counters, self.residency
        key = move.load
        if flight.gives_back:
            self._gave_back(move.drop)
        reason = _REMOVED if key is None and not flight.gives_back else _EVICTED
        from_host = key is not None and not flight.reads
        left_gpu, left_host = residency.commit(op, reason, cost_s, now, from_host, nbytes)
        if key is None:
            counters.unloads += 0 if flight.gives_back else left_host
        else:
            del self._loading[key]
            if self._may_refuse:
                self._failures.forget(key)
            counters.gpu_evictions += left_gpu
            counters.host_evictions += left_host
            counters.activations += move.to is _GPU
            counters.disk_loads += flight.reads
            for request in flight.tickets.values():
                self._grant(request, flight.source, now)
            if move.to is _HOST:
                self._grant_waiting(key, now)
        in_motion = residency.unloading or residency.may_drain or self.squeeze.active
        if in_motion or self.waiting.demands:
            self._after_flight(move, now)
        if flight.speculative:
            self._next_speculation(now)
        actions, self._actions = self._actions, []
        return actions

    def failed(
        self,
        op: int,
        error: LoraCacheError,
        now: float,
        *,
        demoted: Iterable[AdapterKey] = (),
        dropped: Iterable[AdapterKey] = (),
    ) -> list[Action]:
        """The engine could not carry out `op`: its tickets are refused and the victims stay.

        Args:
            demoted: victims that lost their slot all the same; the state rolls forward to that.
            dropped: victims that left host memory (and slots) all the same; the newcomer, too, if
                it was in host memory and is no more.
        """
        flight = self._flights.pop(op)
        move, gone = flight.move, frozenset(dropped)
        if flight.gives_back:
            self._gave_back(gone)
        self.residency.abort(op, frozenset(demoted), gone, now)
        self.counters.load_failures += 1
        self._may_refuse = True
        if move.load is not None:
            del self._loading[move.load]
            error = self._failures.add(move.load, error, now)
            for request in flight.tickets.values():
                self._refuse(request, error)
            if demand := self.waiting.get(move.load):
                self._abandon(demand, error)
            self._repair(move.load, flight.nbytes)
        else:
            self.squeeze.failed(now, self.limits.retry_s)
            for key in move.drop:
                for ticket in self.residency.unloading.pop(key, ()):
                    self._actions.append(Refused(ticket, again(error)))
        for key in (*move.demote, *move.drop):
            self._grant_waiting(key, now)
        self._after_flight(move, now)
        if flight.speculative:
            self._next_speculation(now)
        return self._take_actions()

    def reconcile(self, holdings: Holdings, now: float) -> list[Action]:
        """Compare what we believe with what the engine holds; count (`drift`) and repair.

        Lost copies are forgotten, and brought back if they are leased or pinned; copies that
        nobody asked for are dropped.  Copies that are moving are left out, so `holdings` must be
        from a moment when the engine had finished, or not begun, whatever is in flight.
        """
        residency = self.residency
        in_slots = frozenset(holdings.slots.values())
        in_host = holdings.host | in_slots
        for table, truth in ((residency.gpu, in_slots), (residency.host, in_host)):
            for lost in [copy for copy in table if not copy.op and copy.key not in truth]:
                self.counters.drift += 1
                held = residency.host.get(lost.key)
                table.lose(lost.key, now)
                self._repair(lost.key, held.nbytes if held else 0)
        moving = {key for flight in self._flights.values() for key in flight.move.involved}
        strangers = [k for k in in_host - moving if k not in residency.host]
        promoted = [k for k in in_slots - moving if k in residency.host and k not in residency.gpu]
        self.counters.drift += len(strangers) + len(promoted)
        for key in sorted(promoted, key=str):
            residency.gpu.adopt(key, now)
            self._grant_waiting(key, now)
        if strangers:
            self._drop(sorted(strangers, key=str), now)
        self._pump(now)
        return self._take_actions()

    # ------------------------------------------------------------------ questions

    @property
    def in_flight(self) -> int:
        """Number of transitions that the engine has not answered."""
        return len(self._flights)

    def awaited(self) -> dict[AdapterKey, int]:
        """Adapters that are waited for or on their way, and how many tickets wait for each."""
        found = Counter({demand.key: len(demand.tickets) for demand in self.waiting})
        found.update({key: len(flight.tickets) for key, flight in self._loading.items()})
        found.update(ticket.key for ticket in self._speculation)
        return found

    def check(self) -> None:
        """Assert every invariant that one state can show (tests call this after each event)."""
        check_invariants(
            self.residency,
            self.waiting,
            held=self._held,
            moves=[flight.move for flight in self._flights.values()],
        )
        self._speculation.check(sum(flight.speculative for flight in self._flights.values()))

    # ------------------------------------------------------------------ serving the line

    def _pump(self, now: float) -> None:
        """Serve the line, oldest first, as far as there is room; then balance the drains."""
        if self.squeeze.active:
            self._give_back(now)
        self._read_ahead(now)
        slots_left, speculates = True, self.squeeze.speculates
        for demand in self.waiting:
            key = demand.key
            needs_slot = demand.tier is _GPU or not self.limits.stages_without_slot
            unloading = key in self.residency.unloading and not demand.repair
            if unloading or self.residency.is_moving(key):
                # Looked at again when that transition has ended.  If its host copy is the victim of
                # somebody else's load, or it is read late, it keeps its place in line meanwhile.
                keeps_place = key not in self._loading or self._is_read_late(demand)
                if needs_slot and not unloading and keeps_place:
                    slots_left = False
                continue
            if needs_slot and key in self.residency.gpu and slots_left:
                self._undrain(key, now)  # set aside for an older waiter; now its own turn came
            elif not demand.repair and (error := self.residency.too_large(key, demand.nbytes)):
                self._abandon(demand, error)
            elif not speculates and demand.speculative:
                self._refuse_speculation(demand)
            elif self._is_busy:
                break  # decided when the engine has finished
            elif needs_slot and not slots_left:
                if self.waiting.only_leases and self.limits.host_bytes is None:
                    break  # neither can any of the others be served
                self._refuse_speculation(demand)  # strictly in order: an older waiter comes first
            elif start := self._start_demand(demand, needs_slot, now):
                self.waiting.remove(key)
                self._actions.append(start)
            else:
                slots_left = slots_left and not needs_slot
                self._refuse_speculation(demand)
        self._read_ahead(now)  # others have come to the front
        self._balance_drains(now)

    def _ask(self, request: Ticket, now: float) -> Start | None:
        """Answer a request, or see to it that it is answered; a load for it may begin at once."""
        key, want, residency = request.key, request.want, self.residency
        if want is not _LEASE or self._may_refuse:
            if error := self._refusal(request, now):
                self._actions.append(Refused(request.number, error))
                return None
            residency.pins.announce(request)
        flight = self._loading.get(key)
        if want is not _LEASE and residency.is_ready(key, want.tier):
            self._grant(request, residency.found_in(key), now)
        elif flight and (want.tier is _HOST or flight.move.to is _GPU):
            flight.tickets[request.number] = request
        elif want is _STAGE and self._speculation.is_full:
            self._speculation.put_off(request)
        elif start := self._start_at_once(request, now):
            return start
        else:
            self.waiting.join(request)
            self._pump(now)
        return None

    def _next_speculation(self, now: float) -> None:
        """A load that nobody waited for has ended: begin what was put off."""
        self._speculation.under_way -= 1
        while request := self._speculation.take():
            self._ask(request, now)

    def _after_flight(self, move: Transition, now: float) -> None:
        for key in (*move.involved, *self.residency.unloading):
            self._advance_unload(key, now)
        self._pump(now)
