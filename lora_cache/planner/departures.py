"""What leaves: victims that drain, adapters that are unloaded, memory that is given back."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from math import inf

from lora_cache.errors import PinnedError
from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Granted, Limits, Refused, Start, Transition
from lora_cache.planner.answers import Answers
from lora_cache.planner.waiting import Demand, Flight
from lora_cache.policies import Policy
from lora_cache.state import Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_HOST, _DISK = Tier.HOST, Tier.DISK


class Departures(Answers):
    """The part of the planner that lets copies go; what comes is the rest's affair."""

    def __init__(
        self, limits: Limits, gpu_policy: Policy, host_policy: Policy, explains: bool
    ) -> None:
        super().__init__(limits, gpu_policy, host_policy)
        self._explains = explains
        self._flights: dict[int, Flight] = {}
        self._loading: dict[AdapterKey, Flight] = {}  # flights by newcomer
        self._max_in_flight = inf if limits.max_in_flight is None else limits.max_in_flight
        self._ops = count(1)

    @property
    def _is_busy(self) -> bool:
        return len(self._flights) >= self._max_in_flight

    def _balance_drains(self, now: float) -> None:
        """Keep as many victims draining as there are adapters that have waited too long.

        An adapter that loses a copy to an older waiter's load counts, too: it will need a slot as
        soon as that has ended, and a victim that took new leases meanwhile would be late for it.
        One that began to be read before it had waited too long needs none until it is there.
        """
        overdue = 0
        for demand in self.waiting.demands.values():
            if demand.since + self.limits.drain_after_s > now or overdue == self.limits.slots:
                break
            is_read = demand.key in self._loading and demand.read_at is not None
            overdue += not is_read or self._is_read_late(demand)
        drained, spared = self.residency.balance_drains(overdue, now)
        self.counters.drains += drained
        for key in spared:
            self._undrain(key, now)

    def _is_read_late(self, demand: Demand) -> bool:
        """It was overdue before it began to be read: its place is kept for it meanwhile."""
        due = demand.since + self.limits.drain_after_s
        return demand.read_at is not None and demand.read_at >= due

    def _advance_unload(self, key: AdapterKey, now: float) -> None:
        """The next step of an unload: wait for a load, drain, drop, report; or give it up."""
        tickets = self.residency.unloading.get(key)
        if tickets is None or self.residency.is_moving(key):
            return
        if not tickets or key not in self.residency.host:
            del self.residency.unloading[key]
            self._actions += [Granted(ticket, _DISK) for ticket in tickets]
            self._balance_drains(now)  # it may be set aside for somebody in line, too
        elif key in self.residency.pins:
            del self.residency.unloading[key]
            for ticket in tickets:
                error = PinnedError(f"{key} is pinned: unpin it before unloading", key=key)
                self._actions.append(Refused(ticket, error))
            self._balance_drains(now)
        else:
            self.residency.drain(key, now)
            if key not in self.residency.leases and not self._is_busy:
                self._drop([key], now)

    def _give_back(self, now: float) -> None:
        """Bring host memory down to its budget, as far as anybody may leave."""
        if resized := self.squeeze.advance(now):
            self._actions.append(resized)
        if not self._is_busy and (surplus := self.squeeze.surplus(now)):
            self._drop(surplus, now, gives_back=True)

    def _gave_back(self, keys: Iterable[AdapterKey]) -> None:
        for copy in filter(None, map(self.residency.host.get, keys)):
            self.counters.given_back += 1
            self.counters.given_back_bytes += copy.nbytes

    def _drop(self, keys: list[AdapterKey], now: float, gives_back: bool = False) -> None:
        move = Transition(next(self._ops), drop=tuple(keys))
        self._flights[move.op] = Flight(move, _HOST, gives_back=gives_back)
        self.residency.begin_drop(move, now)
        explains = gives_back and self._explains
        self._actions.append(Start(move, self.residency.choices(move, now) if explains else ()))
