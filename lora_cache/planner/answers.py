"""What callers are told, and what was promised to them: the planner's books."""

from __future__ import annotations

from lora_cache.errors import LoraCacheError
from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Action, Counters, Limits, Refused, Want, make_granted
from lora_cache.planner.failures import Failures, again
from lora_cache.planner.residency import Residency, no_room
from lora_cache.planner.squeeze import Squeeze
from lora_cache.planner.waiting import Demand, Ticket, WaitingLine
from lora_cache.policies import Policy
from lora_cache.state import Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_GPU, _HOST, _DISK = Tier
_LEASE, _STAGE = Want.LEASE, Want.STAGE


class Answers:
    """The half of the planner that answers; the other half moves adapters.

    Attributes:
        squeeze: what scarce memory changes.
    """

    def __init__(self, limits: Limits, gpu_policy: Policy, host_policy: Policy) -> None:
        self.limits = limits
        self.waiting = WaitingLine()
        self.residency = Residency(limits, gpu_policy, host_policy, self.waiting)
        self.counters = Counters()
        self.squeeze = Squeeze(self.residency, limits.shrink_every_s)
        self._failures = Failures(limits.retry_s, limits.retry_max_s)
        self._held: dict[int, AdapterKey] = {}  # granted leases by ticket
        self._actions: list[Action] = []

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    # ------------------------------------------------------------------ granting

    def _grant(self, request: Ticket, served_from: Tier, now: float) -> None:
        if request.want is _LEASE:
            self._held[request.number] = request.key
            self.residency.add_lease(request.key, now)
            if served_from is _HOST:
                self.counters.host_hits += 1
            elif served_from is _DISK:
                self.counters.disk_hits += 1
            else:
                self.counters.slot_hits += 1
        else:
            self.residency.pins.establish(request.number)
        self._actions.append(make_granted((request.number, served_from)))

    def _grant_waiting(self, key: AdapterKey, now: float) -> None:
        """Grant the tickets in line for `key` whose tier is ready."""
        demand = self.waiting.get(key)
        if demand is None:
            return
        if demand.repair and self.residency.is_ready(key, demand.repair):
            self.waiting.repaired(key)
        for request in list(demand.tickets.values()):
            if self.residency.is_ready(key, request.want.tier):
                self.waiting.leave(request)
                self._grant(request, self.residency.found_in(key), now)

    # ------------------------------------------------------------------ refusing

    def _refusal(self, request: Ticket, now: float) -> LoraCacheError | None:
        """Why this ticket is hopeless from the start, if it is."""
        scarce = self.squeeze.pin_refusal(request.key, request.want)
        self.counters.pins_refused += scarce is not None
        return (
            scarce
            or self._failures.standing(request.key, now)
            or self.residency.pins.refusal(request.key, request.want)
            or self.residency.too_large(request.key, request.nbytes)
        )

    def _refuse(self, request: Ticket, error: LoraCacheError) -> None:
        self.residency.pins.withdraw(request.number)
        self._actions.append(Refused(request.number, again(error)))

    def _refuse_speculation(self, demand: Demand) -> None:
        for request in list(demand.tickets.values()):
            if request.want is _STAGE:
                self.waiting.leave(request)
                if self.squeeze.speculates:
                    self._refuse(request, no_room(demand.key))
                else:
                    self.counters.prefetches_refused += 1
                    self._refuse(request, self.squeeze.no_speculation(demand.key))

    def _abandon(self, demand: Demand, error: LoraCacheError) -> None:
        self.waiting.remove(demand.key)
        for request in demand.tickets.values():
            self._refuse(request, error)

    # ------------------------------------------------------------------ keeping promises

    def _undrain(self, key: AdapterKey, now: float) -> None:
        self.residency.undrain(key, now)
        self._grant_waiting(key, now)

    def _next_overdue(self, now: float) -> float | None:
        """When somebody will have waited too long."""
        for demand in self.waiting.demands.values():
            if demand.repair:
                return self._failures.until(demand.key, now)
            deadline = demand.since + self.limits.drain_after_s
            if deadline > now:
                return deadline
        return None

    def _repair(self, key: AdapterKey, nbytes: int = 0) -> None:
        """Put `key` first in line if a lease or a pin holds it where it is not; else take it out.

        Until it is back nobody else gets the slot that it lost, so leased ∪ pinned still fit.
        """
        leased = key in self.residency.leases
        tier = _GPU if leased else self.residency.pins.tier_of(key)
        demand = self.waiting.get(key)
        if tier is not None and not self.residency.has(key, tier):
            self.waiting.repair(key, max(nbytes, demand.nbytes if demand else 0), tier)
        elif demand is not None and demand.repair:
            self.waiting.repaired(key)
