"""Who waits for what: tickets, gathered per adapter, served oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Want
from lora_cache.state import Tier


@dataclass(frozen=True, slots=True)
class Ticket:
    """One caller's request, waiting or travelling with a load."""

    number: int
    key: AdapterKey
    nbytes: int
    want: Want
    since: float


@dataclass(slots=True)
class Demand:
    """All tickets that wait for one adapter.

    Attributes:
        repair: the engine lost a copy that is leased or pinned; it comes back into this tier,
            first in the line and without a ticket.
    """

    key: AdapterKey
    nbytes: int
    tickets: dict[int, Ticket] = field(default_factory=dict)
    repair: Tier | None = None

    @property
    def since(self) -> float:
        """When the oldest ticket came; a repair is older than any."""
        if self.repair:
            return float("-inf")
        return next(iter(self.tickets.values())).since

    @property
    def tier(self) -> Tier:
        tiers = {self.repair, *(ticket.want.tier for ticket in self.tickets.values())}
        return Tier.GPU if Tier.GPU in tiers else Tier.HOST

    @property
    def speculative(self) -> bool:
        """Nobody is held up if this is not served."""
        return not self.repair and all(t.want is Want.STAGE for t in self.tickets.values())


class WaitingLine:
    """Demands in order of their oldest ticket."""

    def __init__(self) -> None:
        self._demands: OrderedDict[AdapterKey, Demand] = OrderedDict()

    def __len__(self) -> int:
        return len(self._demands)

    def __iter__(self) -> Iterator[Demand]:
        """Oldest first, over a copy: demands may leave while the line is walked."""
        return iter(tuple(self._demands.values()))

    def get(self, key: AdapterKey) -> Demand | None:
        return self._demands.get(key)

    def join(self, ticket: Ticket) -> None:
        demand = self._demands.get(ticket.key)
        if demand is None:
            demand = self._demands[ticket.key] = Demand(ticket.key, ticket.nbytes)
        demand.tickets[ticket.number] = ticket

    def repair(self, key: AdapterKey, nbytes: int, tier: Tier) -> None:
        """Put `key` first in the line, with or without tickets."""
        demand = self._demands.setdefault(key, Demand(key, nbytes))
        demand.repair, demand.nbytes = tier, nbytes
        self._demands.move_to_end(key, last=False)

    def repaired(self, key: AdapterKey) -> None:
        """The lost copy of `key` is back; its tickets, if any, stay in line."""
        demand = self._demands[key]
        demand.repair = None
        if not demand.tickets:
            del self._demands[key]

    def leave(self, ticket: Ticket) -> None:
        """Take one ticket out; the demand goes with its last one, or falls back in the line."""
        demand = self._demands[ticket.key]
        oldest = demand.since
        del demand.tickets[ticket.number]
        if not demand.tickets and not demand.repair:
            del self._demands[ticket.key]
        elif demand.since != oldest:
            self._demands = OrderedDict(
                sorted(self._demands.items(), key=lambda item: item[1].since)
            )

    def remove(self, key: AdapterKey) -> Demand | None:
        return self._demands.pop(key, None)
