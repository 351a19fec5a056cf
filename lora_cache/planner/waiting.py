"""Who waits for what: tickets, gathered per adapter, in line or with a load under way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_cache.key import AdapterKey
from lora_cache.planner.actions import Transition, Want
from lora_cache.state import Tier

# Looked up once: in Python 3.11 an attribute of an Enum takes as long as three calls.
_GPU, _HOST = Tier.GPU, Tier.HOST
_LEASE, _STAGE = Want.LEASE, Want.STAGE


@dataclass(slots=True)
class Ticket:
    """One caller's request, waiting or travelling with a load.  Never changed."""

    number: int
    key: AdapterKey
    nbytes: int
    want: Want
    since: float


Tickets = dict[int, Ticket]


@dataclass(slots=True)
class Demand:
    """All tickets that wait for one adapter.

    Attributes:
        repair: the engine lost a copy that is leased or pinned; it comes back into this tier,
            first in the line and without a ticket.
        read_at: when it began to be read for these tickets; None: it was in host memory.
    """

    key: AdapterKey
    nbytes: int
    tickets: Tickets = field(default_factory=dict)
    repair: Tier | None = None
    read_at: float | None = None

    @property
    def since(self) -> float:
        """When the oldest ticket came; a repair is older than any."""
        if self.repair:
            return float("-inf")
        return next(iter(self.tickets.values())).since

    @property
    def tier(self) -> Tier:
        if self.repair is _GPU:
            return _GPU
        for ticket in self.tickets.values():
            if ticket.want.tier is _GPU:
                return _GPU
        return _HOST

    @property
    def speculative(self) -> bool:
        """Nobody is held up if this is not served."""
        if self.repair:
            return False
        for ticket in self.tickets.values():  # noqa: SIM110 - `all` takes three times as long
            if ticket.want is not _STAGE:
                return False
        return True


@dataclass(slots=True)
class Flight:
    """A transition that the engine is carrying out, and who waits for it.

    Attributes:
        source: where its tickets are told that the newcomer was found.
        reads: the newcomer is read from disk.
        nbytes: what it is charged in host memory.
        gives_back: it drops copies because memory is scarce.
        speculative: nobody waited for it when it began.
    """

    move: Transition
    source: Tier
    reads: bool = False
    nbytes: int = 0
    tickets: Tickets = field(default_factory=dict)
    gives_back: bool = False
    speculative: bool = False


class WaitingLine:
    """Demands in order of their oldest ticket.

    Attributes:
        demands: by key, oldest first.
        tickets: all of theirs, by number.
    """

    def __init__(self) -> None:
        self.tickets: Tickets = {}
        self._others = 0  # of them, those that want something else than a lease
        self.demands: OrderedDict[AdapterKey, Demand] = OrderedDict()

    def __len__(self) -> int:
        return len(self.demands)

    def __contains__(self, key: object) -> bool:
        return key in self.demands

    def __iter__(self) -> Iterator[Demand]:
        """Oldest first, over a copy: demands may leave while the line is walked."""
        return iter(tuple(self.demands.values()))

    @property
    def only_leases(self) -> bool:
        """Nobody in the line wants anything else."""
        return not self._others

    def get(self, key: AdapterKey) -> Demand | None:
        return self.demands.get(key)

    def join(self, ticket: Ticket) -> None:
        demand = self.demands.get(ticket.key)
        if demand is None:
            demand = self.demands[ticket.key] = Demand(ticket.key, ticket.nbytes)
        demand.tickets[ticket.number] = self.tickets[ticket.number] = ticket
        self._others += ticket.want is not _LEASE

    def repair(self, key: AdapterKey, nbytes: int, tier: Tier) -> None:
        """Put `key` first in the line, with or without tickets."""
        demand = self.demands.setdefault(key, Demand(key, nbytes))
        demand.repair, demand.nbytes = tier, nbytes
        self.demands.move_to_end(key, last=False)

    def repaired(self, key: AdapterKey) -> None:
        """The lost copy of `key` is back; its tickets, if any, stay in line."""
        demand = self.demands[key]
        demand.repair = None
        if not demand.tickets:
            del self.demands[key]

    def leave(self, ticket: Ticket) -> None:
        """Take one ticket out; the demand goes with its last one, or falls back in the line."""
        demand = self.demands[ticket.key]
        oldest = demand.since
        del demand.tickets[ticket.number]
        self._forget(ticket)
        if not demand.tickets and not demand.repair:
            del self.demands[ticket.key]
        elif demand.since != oldest:
            self.demands = OrderedDict(sorted(self.demands.items(), key=lambda item: item[1].since))

    def remove(self, key: AdapterKey) -> Demand | None:
        demand = self.demands.pop(key, None)
        for ticket in demand.tickets.values() if demand else ():
            self._forget(ticket)
        return demand

    def _forget(self, ticket: Ticket) -> None:
        del self.tickets[ticket.number]
        self._others -= ticket.want is not _LEASE
