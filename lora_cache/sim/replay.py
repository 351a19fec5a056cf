"""Replays of one trace through one planner: with leases that end at once, and with leases held.

The planner and its policies are those that serve; only the engine is reckoned (`TransferCost`).
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import count

from lora_cache.errors import LoraCacheError
from lora_cache.key import AdapterKey
from lora_cache.planner import Action, Granted, Limits, Planner, Refused, Start, Transition
from lora_cache.policies import Policy
from lora_cache.sim.belady import Future
from lora_cache.sim.cost import TransferCost
from lora_cache.sim.hold import Hold
from lora_cache.sim.quantiles import Quantiles
from lora_cache.sim.uses import Use
from lora_cache.state import Tier

_GPU = Tier.GPU


class Replay(ABC):
    """Feeds requests to a planner and carries out what it decides.

    Args:
        policies: for slots and for host memory.
        future: what policies that know it look into, if they do.

    Attributes:
        wait_s: seconds that requests waited, in all.
        from_disk_bytes: moved from disk into host memory.
        into_slots_bytes: moved from host memory into slots.
    """

    def __init__(
        self,
        limits: Limits,
        policies: tuple[Policy, Policy],
        cost: TransferCost,
        future: Future | None = None,
    ) -> None:
        self.planner = Planner(limits, *policies)
        self._held = self.planner.residency.host.copies
        self.wait_s = 0.0
        self.from_disk_bytes = 0
        self.into_slots_bytes = 0
        self._cost = cost
        self._future = future
        self._ticket = 0  # the last one

    @abstractmethod
    def feed(self, uses: Iterable[Use]) -> None:
        """The next requests come, in order of time."""

    def advance(self, now: float) -> None:  # noqa: B027 - where nothing takes time there is nothing
        """Let happen what falls due until `now`."""

    @abstractmethod
    def finish(self) -> None:
        """No more requests come: let those that are here end."""

    @abstractmethod
    def waited_s(self, share: float) -> float | None:
        """Quantile of the seconds that a request waited, or None where it was not measured."""

    def _load(self, move: Transition) -> float:
        """Count what the transition moves.  Returns the seconds that it takes."""
        held = self._held[move.load]  # type: ignore[index]  # nobody unloads: it has its place
        nbytes, seconds = held.nbytes, 0.0
        if move.to is _GPU:
            self.into_slots_bytes += nbytes
            seconds = self._cost.host_to_slot_s(nbytes)
        if held.op:  # that place is empty yet
            self.from_disk_bytes += nbytes
            seconds += self._cost.disk_to_host_s(nbytes)
        return seconds


class InstantReplay(Replay):
    """Loads complete and leases end at once, so each request finds every slot idle.

    Then misses do not depend on durations, and can be compared with the literature.  `wait_s`
    sums up what the loads would have taken.
    """

    def feed(self, uses: Iterable[Use]) -> None:
        acquire, release = self.planner.acquire, self.planner.release
        future, ticket = self._future, self._ticket
        for now, key, nbytes, _ in uses:
            if future is not None:
                future.arrive(key)
            ticket += 1
            actions = acquire(ticket, key, nbytes, now)
            if not actions or type(actions[0]) is not Granted:
                self._carry_out(actions, key, now)
            release(ticket, now)
        self._ticket = ticket

    def finish(self) -> None:
        pass

    def waited_s(self, share: float) -> float | None:
        return None

    def _carry_out(self, actions: list[Action], key: AdapterKey, now: float) -> None:
        """Complete the load that the request for `key` waits for, and see it granted."""
        action = actions[0] if actions else None
        if type(action) is Start:
            move = action.transition
            seconds = self._load(move)
            self.wait_s += seconds
            actions = self.planner.completed(move.op, seconds, now)
            if actions and type(actions[0]) is Granted:
                return
        if type(action) is Refused:
            raise action.error
        raise LoraCacheError(f"the policy names no victim for {key}, though nothing is in use")


class HeldReplay(Replay):
    """Loads and leases take time: a discrete-event simulation.

    Who finds every slot in use waits, and the planner's deadlines are kept, as a server does.
    """

    def __init__(
        self,
        limits: Limits,
        policies: tuple[Policy, Policy],
        cost: TransferCost,
        future: Future | None = None,
        hold: Hold = Hold(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(limits, policies, cost, future)
        self._hold = hold
        self._quantiles = Quantiles()
        self._events: list[tuple[float, int, Transition | int, float]] = []
        self._order = count()  # decides between events of one moment
        self._waiting: dict[int, tuple[float, float]] = {}  # arrival and hold, by ticket
        self._deadline = math.inf

    def feed(self, uses: Iterable[Use]) -> None:
        for now, key, nbytes, output_tokens in uses:
            self._run_until(now)
            if self._future is not None:
                self._future.arrive(key)
            self._ticket = ticket = self._ticket + 1
            self._waiting[ticket] = (now, self._hold.seconds(output_tokens))
            self._perform(self.planner.acquire(ticket, key, nbytes, now), now)

    def advance(self, now: float) -> None:
        self._run_until(now)

    def finish(self) -> None:
        self._run_until(math.inf)
        if self._waiting:
            raise LoraCacheError("the policy names no victim, though nothing is in use")

    def waited_s(self, share: float) -> float | None:
        return self._quantiles.quantile(share)

    def _run_until(self, until: float) -> None:
        """Let happen what falls due, in order; loads and leases end before anybody is overdue."""
        events = self._events
        while True:
            at = events[0][0] if events else math.inf
            now = min(at, self._deadline)
            if now > until or now == math.inf:
                return
            if at > self._deadline:
                self._perform(self.planner.tick(now), now)
                continue
            _, _, what, seconds = heapq.heappop(events)
            if isinstance(what, Transition):
                self._perform(self.planner.completed(what.op, seconds, now), now)
            else:
                self._perform(self.planner.release(what, now), now)

    def _perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Granted):
                came, hold_s = self._waiting.pop(action.ticket)
                self.wait_s += now - came
                self._quantiles.add(now - came)
                self._schedule(now + hold_s, action.ticket)
            elif isinstance(action, Start):
                seconds = self._load(action.transition)
                self._schedule(now + seconds, action.transition, seconds)
            elif isinstance(action, Refused):
                raise action.error
        if not self.planner.waiting.demands:
            self._deadline = math.inf
        elif not now < self._deadline < math.inf:
            # One that lies ahead stays: who comes later is due later, and a tick too many is no
            # event.  In a long line, asking after each event would take most of the time.
            deadline = self.planner.next_deadline(now)
            self._deadline = math.inf if deadline is None else deadline

    def _schedule(self, at: float, what: Transition | int, seconds: float = 0.0) -> None:
        heapq.heappush(self._events, (at, next(self._order), what, seconds))
