"""What comes: adapters that are brought into slots and host memory."""

from __future__ import annotations

from itertools import islice

from lora_cache.planner.actions import Limits, Start, Want, make_start
from lora_cache.planner.departures import Departures
from lora_cache.planner.speculation import Speculation
from lora_cache.planner.waiting import Demand, Flight, Ticket
from lora_cache.policies import Policy
from lora_cache.state import Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_GPU, _HOST, _DISK = Tier
_LEASE = Want.LEASE


class Arrivals(Departures):
    """The part of the planner that begins loads; who gets one, and when, is the rest's affair."""

    def __init__(
        self, limits: Limits, gpu_policy: Policy, host_policy: Policy, explains: bool
    ) -> None:
        super().__init__(limits, gpu_policy, host_policy, explains)
        self._speculation = Speculation(limits.max_speculative)

    def _start_at_once(self, request: Ticket, now: float) -> Start | None:
        """Do for a lease what joining an empty line and serving it would, without the line."""
        key, residency = request.key, self.residency
        if request.want is not _LEASE or self.waiting.demands or self._is_busy:
            return None
        held = residency.host.get(key)
        if key in residency.gpu.copies or key in residency.unloading or (held and held.op):
            return None
        if held is None and self._reads_ahead:
            return None
        return self._start(Demand(key, request.nbytes, {request.number: request}), True, now)

    @property
    def _reads_ahead(self) -> bool:
        return self.limits.stages_without_slot and not self.squeeze.active

    def _read_ahead(self, now: float) -> None:
        """Have what waits for a slot and is on disk read before it gets one.

        The slot's adapter is used by others meanwhile.  Who is read keeps its place in line; as
        many are read as there are slots.  Where host memory is scarce, or has no room that nobody
        needs, an adapter is read when it has its slot.
        """
        if not self._reads_ahead:
            return
        held, unloading = self.residency.host.copies, self.residency.unloading
        for demand in islice(self.waiting.demands.values(), self.limits.slots):
            key = demand.key
            if key in held or key in unloading or demand.repair or demand.tier is _HOST:
                continue
            move = None
            if not self._is_busy:
                move = self.residency.bring_in(self._ops, demand, slot=False, gently=True, now=now)
            if move is None:
                return
            demand.read_at = now
            flight = Flight(move, _DISK, reads=True, nbytes=demand.nbytes)
            self._actions.append(self._take_off(flight, now))

    def _start_demand(self, demand: Demand, slot: bool, now: float) -> Start | None:
        if demand.repair and self._failures.standing(demand.key, now):  # its place is kept for it
            return None
        return self._start(demand, slot, now)

    def _start(self, demand: Demand, slot: bool, now: float) -> Start | None:
        """Bring the adapter in, if there is room or room can be made."""
        reads, spec = demand.key not in self.residency.host.copies, demand.speculative
        move = self.residency.bring_in(self._ops, demand, slot, spec, now)
        if move is None:
            return None
        source = _HOST if demand.read_at is None and not reads else _DISK
        flight = Flight(move, source, reads, demand.nbytes, demand.tickets, speculative=spec)
        return self._take_off(flight, now)

    def _take_off(self, flight: Flight, now: float) -> Start:
        move = flight.move
        assert move.load is not None
        self._loading[move.load] = self._flights[move.op] = flight
        self._speculation.under_way += flight.speculative
        return make_start((move, self.residency.choices(move, now) if self._explains else ()))
