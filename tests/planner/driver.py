"""A planner with a scripted engine: the test decides when and how each transition ends."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from lora_cache.adapter import AdapterKey
from lora_cache.errors import LoadFailedError, LoraCacheError
from lora_cache.level import Level
from lora_cache.planner import (
    Action,
    Granted,
    Limits,
    Planner,
    Refused,
    Resized,
    Start,
    Transition,
    Want,
)
from lora_cache.policies import LRU, Policy


def key_of(number: int) -> AdapterKey:
    return AdapterKey(f"test:{number:04d}", f"a{number}")


class Driver:
    """Feeds events to a planner and keeps the books that the planner must agree with."""

    def __init__(
        self,
        limits: Limits,
        gpu_policy: Callable[[], Policy] = LRU,
        host_policy: Callable[[], Policy] = LRU,
        nbytes: Callable[[int], int] = lambda number: 1,
    ) -> None:
        self.planner = Planner(limits, gpu_policy(), host_policy())
        self.nbytes = nbytes
        self.now = 0.0
        self.flights: dict[int, Transition] = {}
        self.waiting: dict[int, tuple[AdapterKey, Want]] = {}
        self.leases: dict[int, AdapterKey] = {}
        self.granted: dict[int, Granted] = {}
        self.refused: dict[int, LoraCacheError] = {}
        self.unloads: set[int] = set()
        self.budgets: list[tuple[float, int | None]] = []  # when it changed, and to what
        self._tickets = count(1)

    def acquire(self, number: int, want: Want = Want.LEASE) -> int:
        ticket = next(self._tickets)
        key = key_of(number)
        self.waiting[ticket] = (key, want)
        self.take(self.planner.acquire(ticket, key, self.nbytes(number), self.now, want))
        return ticket

    def unload(self, number: int) -> int:
        ticket = next(self._tickets)
        self.unloads.add(ticket)
        self.take(self.planner.unload(ticket, key_of(number), self.now))
        return ticket

    def release(self, ticket: int) -> None:
        del self.leases[ticket]
        self.take(self.planner.release(ticket, self.now))

    def cancel(self, ticket: int) -> None:
        self.waiting.pop(ticket, None)
        self.unloads.discard(ticket)
        self.take(self.planner.cancel(ticket, self.now))

    def complete(self, op: int | None = None, taken: int | None = None) -> Transition:
        """`taken`: what the newcomer takes in host memory, if the engine says so."""
        move = self.flights.pop(min(self.flights) if op is None else op)
        self.take(self.planner.completed(move.op, 0.1, self.now, taken))
        return move

    def fail(self, op: int | None = None, message: str = "no", *, lost: bool = False) -> Transition:
        """`lost`: the newcomer has left host memory, if it was there."""
        move = self.flights.pop(min(self.flights) if op is None else op)
        dropped = [move.load] if lost and move.load else []
        error = LoadFailedError(message)
        self.take(self.planner.failed(move.op, error, self.now, dropped=dropped))
        return move

    def press(self, host: Level = Level.NONE, gpu: Level = Level.NONE) -> None:
        self.take(self.planner.press(host, gpu, self.now))

    def lease(self, number: int) -> int:
        """Acquire, and carry out everything that it takes."""
        ticket = self.acquire(number)
        while ticket in self.waiting and self.flights:
            self.complete()
        assert ticket in self.leases, "not granted"
        return ticket

    def settle(self) -> None:
        """Carry out what is in flight, and what follows from it."""
        while self.flights:
            self.complete()

    def use(self, number: int) -> None:
        self.release(self.lease(number))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(move):
                    touched = [move.load, *{*move.demote, *move.drop}]
                    for other in self.flights.values():
                        busy = {other.load, *other.demote, *other.drop} - {None}
                        assert not busy & set(touched), "two transitions of one key"
                    self.flights[move.op] = move
                case Granted(ticket):
                    self.granted[ticket] = action
                    if ticket in self.unloads:
                        self.unloads.remove(ticket)
                        continue
                    key, want = self.waiting.pop(ticket)
                    if want is Want.LEASE:
                        self.leases[ticket] = key
                case Refused(ticket, error):
                    self.refused[ticket] = error
                    self.unloads.discard(ticket)
                    self.waiting.pop(ticket, None)
                case Resized(before, after):
                    assert before == (self.budgets[-1][1] if self.budgets else None) != after
                    self.budgets.append((self.now, after))
        self.planner.check()
        if not self.planner.limits.max_in_flight or not self.flights:
            assert not self.planner.squeeze.surplus(self.now), "idle copies beyond the budget"
        leased = dict.fromkeys(self.leases.values(), 0)
        for key in self.leases.values():
            leased[key] += 1
        assert leased == self.planner.residency.leases

    def slots(self) -> set[str]:
        """Names of what is ready in a slot."""
        table = self.planner.residency.gpu
        return {copy.key.name for copy in table if table.is_ready(copy.key)}

    def host(self) -> set[str]:
        table = self.planner.residency.host
        return {copy.key.name for copy in table if table.is_ready(copy.key)}
