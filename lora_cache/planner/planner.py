"""The one brain: events in, actions out.  No I/O, no clock, no torch, no threads.

Every public method is an event; it returns the actions that follow from it, in order.  What an
action needs from the engine comes back as another event (`completed`, `failed`).  Time is an
argument.  The driver may therefore be an event loop, a trace replay or a property test.

How room is made: the slot tier and the host tier each rank victims by their own policy; what is
leased, pinned, moving or (for host) in a slot is skipped, victims are taken until the newcomer
fits, and all of it is set aside in one transition, or nothing (`residency.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from lora_cache.errors import LoraCacheError, NoRoomError, PinnedError
from lora_cache.key import AdapterKey
from lora_cache.planner.actions import (
    Action,
    Counters,
    Granted,
    Holdings,
    Limits,
    Refused,
    Start,
    Transition,
    Want,
)
from lora_cache.planner.failures import Failures, again
from lora_cache.planner.invariants import check_invariants
from lora_cache.planner.residency import Residency
from lora_cache.planner.waiting import Demand, Ticket, WaitingLine
from lora_cache.policies import Policy, RemovalReason
from lora_cache.state import Tier


@dataclass(slots=True)
class _Flight:
    """A transition that the engine is carrying out, and who waits for it."""

    move: Transition
    source: Tier
    nbytes: int = 0
    tickets: dict[int, Ticket] = field(default_factory=dict)


class Planner:
    """Decides which adapter is in which tier.

    Not thread-safe: one caller at a time.  Tickets are numbers that the caller makes up; each is
    used once.  A ticket ends by `Refused`, by `cancel`, or, if it was granted a lease, by
    `release`.
    """

    def __init__(self, limits: Limits, gpu_policy: Policy, host_policy: Policy) -> None:
        self.limits = limits
        self.residency = Residency(limits, gpu_policy, host_policy)
        self.waiting = WaitingLine()
        self.counters = Counters()
        self._failures = Failures(limits.retry_s, limits.retry_max_s)
        self._held: dict[int, AdapterKey] = {}  # granted leases by ticket
        self._queued: dict[int, Ticket] = {}  # tickets in the waiting line
        self._flights: dict[int, _Flight] = {}
        self._loading: dict[AdapterKey, _Flight] = {}  # flights by newcomer
        self._ops = count(1)
        self._actions: list[Action] = []

    # ------------------------------------------------------------------ events: callers

    def acquire(
        self, ticket: int, key: AdapterKey, nbytes: int, now: float, want: Want = Want.LEASE
    ) -> list[Action]:
        """A caller wants `key`; the ticket is granted now, later, or refused.

        Args:
            nbytes: what a copy of `key` is charged in host memory, in bytes.
        """
        if want is Want.LEASE and self.residency.gpu.is_ready(key):  # the hot path
            self._held[ticket] = key
            self.residency.add_lease(key, now)
            self.counters.count_hit(Tier.GPU)
            return [Granted(ticket, Tier.GPU)]
        request = Ticket(ticket, key, nbytes, want, now)
        if error := self._refusal(request, now):
            return [Refused(ticket, error)]
        self.residency.pins.announce(request)
        flight = self._loading.get(key)
        if self.residency.is_ready(key, want.tier):
            self._grant(request, self.residency.found_in(key), now)
        elif flight and (want.tier is Tier.HOST or flight.move.to is Tier.GPU):
            flight.tickets[ticket] = request
        else:
            self.waiting.join(request)
            self._queued[ticket] = request
            self._pump(now)
        return self._take_actions()

    def cancel(self, ticket: int, now: float) -> list[Action]:
        """The caller does not wait any more.  A load that is under way runs to its end."""
        self.residency.pins.withdraw(ticket)
        if request := self._queued.get(ticket):
            self._dequeue(request)
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
            somebody_waits = len(self.waiting) > 0
            self._repair(key)
            self._advance_unload(key, now)
            if somebody_waits:
                self._pump(now)
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

    def next_deadline(self, now: float) -> float | None:
        """When `tick` must be called next, because somebody will have waited too long by then."""
        for demand in self.waiting:
            if demand.repair:
                return self._failures.until(demand.key, now)
            deadline = demand.since + self.limits.drain_after_s
            if deadline > now:
                return deadline
        return None

    # ------------------------------------------------------------------ events: the engine

    def completed(self, op: int, cost_s: float, now: float) -> list[Action]:
        """The engine carried out transition `op`, in `cost_s` seconds."""
        flight = self._flights.pop(op)
        move = flight.move
        reason = RemovalReason.EVICTED if move.load else RemovalReason.REMOVED
        left_gpu, left_host = self.residency.commit(op, reason, cost_s, now)
        if move.load is None:
            self.counters.unloads += len(left_host)
        else:
            del self._loading[move.load]
            self._failures.forget(move.load)
            self.counters.gpu_evictions += len(left_gpu)
            self.counters.host_evictions += len(left_host)
            self.counters.activations += move.to is Tier.GPU
            self.counters.disk_loads += flight.source is Tier.DISK
            for request in flight.tickets.values():
                self._grant(request, flight.source, now)
        self._after_flight(move, now)
        return self._take_actions()

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
            dropped: victims that left host memory (and slots) all the same.
        """
        flight = self._flights.pop(op)
        move = flight.move
        self.residency.abort(op, frozenset(demoted), frozenset(dropped), now)
        self.counters.load_failures += 1
        if move.load is not None:
            del self._loading[move.load]
            error = self._failures.add(move.load, error, now)
            for request in flight.tickets.values():
                self._refuse(request, error)
            if demand := self.waiting.get(move.load):
                self._abandon(demand, error)
            self._repair(move.load, flight.nbytes)
        else:
            for key in move.drop:
                for ticket in self.residency.unloading.pop(key, ()):
                    self._actions.append(Refused(ticket, again(error)))
        for key in (*move.demote, *move.drop):
            self._grant_waiting(key, now)
        self._after_flight(move, now)
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

    def loads(self) -> Iterator[tuple[AdapterKey, int]]:
        """Adapters that are on their way, and how many tickets wait for each."""
        return ((key, len(flight.tickets)) for key, flight in self._loading.items())

    def check(self) -> None:
        """Assert every invariant that one state can show (tests call this after each event)."""
        check_invariants(
            self.residency,
            self.waiting,
            held=self._held,
            queued=self._queued.keys(),
            moves=[flight.move for flight in self._flights.values()],
        )

    # ------------------------------------------------------------------ granting, refusing

    def _grant(self, request: Ticket, served_from: Tier, now: float) -> None:
        if request.want is Want.LEASE:
            self._held[request.number] = request.key
            self.residency.add_lease(request.key, now)
            self.counters.count_hit(served_from)
        self.residency.pins.establish(request.number)
        self._actions.append(Granted(request.number, served_from))

    def _grant_waiting(self, key: AdapterKey, now: float) -> None:
        """Grant the tickets in line for `key` whose tier is ready."""
        demand = self.waiting.get(key)
        if demand is None:
            return
        if demand.repair and self.residency.is_ready(key, demand.repair):
            self.waiting.repaired(key)
        for request in list(demand.tickets.values()):
            if self.residency.is_ready(key, request.want.tier):
                self._dequeue(request)
                self._grant(request, self.residency.found_in(key), now)

    def _refusal(self, request: Ticket, now: float) -> LoraCacheError | None:
        """Why this ticket is hopeless from the start, if it is."""
        return (
            self._failures.standing(request.key, now)
            or self.residency.pins.refusal(request.key, request.want)
            or self.residency.too_large(request.key, request.nbytes)
        )

    def _refuse(self, request: Ticket, error: LoraCacheError) -> None:
        self.residency.pins.withdraw(request.number)
        self._actions.append(Refused(request.number, again(error)))

    def _dequeue(self, request: Ticket) -> None:
        del self._queued[request.number]
        self.waiting.leave(request)

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    # ------------------------------------------------------------------ serving the line

    def _pump(self, now: float) -> None:
        """Serve the line, oldest first, as far as there is room; then balance the drains."""
        slots_left = True
        for demand in self.waiting:
            key = demand.key
            unloading = key in self.residency.unloading and not demand.repair
            if unloading or self.residency.is_moving(key):
                # Looked at again when that transition has ended.  If its host copy is the victim of
                # somebody else's load, it keeps its place in line meanwhile.
                if not unloading and key not in self._loading and self._needs_slot(demand):
                    slots_left = False
                continue
            needs_slot = self._needs_slot(demand)
            if needs_slot and key in self.residency.gpu and slots_left:
                self._undrain(key, now)  # set aside for an older waiter; now its own turn came
            elif not demand.repair and (error := self.residency.too_large(key, demand.nbytes)):
                self._abandon(demand, error)
            elif self._is_busy:
                break  # decided when the engine has finished
            elif needs_slot and not slots_left:
                self._refuse_speculation(demand)  # strictly in order: an older waiter comes first
            elif not self._start(demand, now):
                slots_left = slots_left and not needs_slot
                self._refuse_speculation(demand)
        self._balance_drains(now)

    def _abandon(self, demand: Demand, error: LoraCacheError) -> None:
        self.waiting.remove(demand.key)
        for request in demand.tickets.values():
            del self._queued[request.number]
            self._refuse(request, error)

    @property
    def _is_busy(self) -> bool:
        limit = self.limits.max_in_flight
        return limit is not None and len(self._flights) >= limit

    def _refuse_speculation(self, demand: Demand) -> None:
        for request in list(demand.tickets.values()):
            if request.want is Want.STAGE:
                self._dequeue(request)
                self._refuse(request, _no_room(demand.key))

    def _start(self, demand: Demand, now: float) -> bool:
        """Bring the adapter in, if there is room or room can be made."""
        key = demand.key
        slot = self._needs_slot(demand)
        if self._failures.standing(key, now):  # a repair that failed; its place is kept for it
            return False
        room = self.residency.make_room(
            key, demand.nbytes, slot=slot, speculative=demand.speculative, now=now
        )
        if room is None:
            return False
        move = Transition(
            next(self._ops),
            load=key,
            to=Tier.GPU if slot else Tier.HOST,
            demote=tuple(room.demote),
            drop=tuple(room.drop),
        )
        flight = _Flight(move, self.residency.found_in(key), demand.nbytes, demand.tickets)
        self._loading[key] = self._flights[move.op] = flight
        self.residency.begin(move, demand.nbytes, now)
        self.waiting.remove(key)
        for number in demand.tickets:
            del self._queued[number]
        self._actions.append(Start(move))
        return True

    def _needs_slot(self, demand: Demand) -> bool:
        return demand.tier is Tier.GPU or not self.limits.stages_without_slot

    def _after_flight(self, move: Transition, now: float) -> None:
        for key in (*move.involved, *self.residency.unloading):
            self._advance_unload(key, now)
        self._pump(now)

    # ------------------------------------------------------------------ draining, unloading

    def _balance_drains(self, now: float) -> None:
        """Keep as many victims draining as there are adapters that have waited too long."""
        overdue = 0
        for demand in self.waiting:
            if demand.since + self.limits.drain_after_s > now or overdue == self.limits.slots:
                break
            overdue += not self.residency.is_moving(demand.key)
        draining = self.residency.draining()
        missing = overdue - len(draining)
        if missing > 0:
            for key in list(self.residency.drainable(now))[:missing]:
                self.residency.drain(key, now)
                self.counters.drains += 1
        elif missing < 0:
            mine = [key for key in draining if key not in self.residency.unloading]
            for key in mine[missing:]:
                self._undrain(key, now)

    def _undrain(self, key: AdapterKey, now: float) -> None:
        self.residency.undrain(key, now)
        self._grant_waiting(key, now)

    def _advance_unload(self, key: AdapterKey, now: float) -> None:
        """The next step of an unload: wait for a load, drain, drop, report; or give it up."""
        tickets = self.residency.unloading.get(key)
        if tickets is None or self.residency.is_moving(key):
            return
        if not tickets or key not in self.residency.host:
            del self.residency.unloading[key]
            self._actions += [Granted(ticket, Tier.DISK) for ticket in tickets]
            self._undrain(key, now)
        elif key in self.residency.pins:
            del self.residency.unloading[key]
            for ticket in tickets:
                error = PinnedError(f"{key} is pinned: unpin it before unloading", key=key)
                self._actions.append(Refused(ticket, error))
            self._undrain(key, now)
        else:
            self.residency.drain(key, now)
            if key not in self.residency.leases and not self._is_busy:
                self._drop([key], now)

    def _drop(self, keys: list[AdapterKey], now: float) -> None:
        move = Transition(next(self._ops), drop=tuple(keys))
        self._flights[move.op] = _Flight(move, Tier.HOST)
        self.residency.begin(move, 0, now)
        self._actions.append(Start(move))

    def _repair(self, key: AdapterKey, nbytes: int = 0) -> None:
        """Put `key` first in line if a lease or a pin holds it where it is not; else take it out.

        Until it is back nobody else gets the slot that it lost, so leased ∪ pinned still fit.
        """
        leased = key in self.residency.leases
        tier = Tier.GPU if leased else self.residency.pins.tier_of(key)
        demand = self.waiting.get(key)
        if tier is not None and not self.residency.has(key, tier):
            self.waiting.repair(key, max(nbytes, demand.nbytes if demand else 0), tier)
        elif demand is not None and demand.repair:
            self.waiting.repaired(key)


def _no_room(key: AdapterKey) -> LoraCacheError:
    return NoRoomError(
        f"no room to stage {key} without disturbing others: it stays on disk",
        key=key,
        tier=Tier.HOST,
    )
