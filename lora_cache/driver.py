"""The planner's hands: carries out what the planner decides, and wakes who waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.clock import Clock, LoopClock, Timer
from lora_cache.engines import Engine, TransitionFailedError
from lora_cache.errors import (
    AdapterChangedError,
    CacheClosedError,
    EngineDeadError,
    EngineError,
    LeaseTimeoutError,
    LoraCacheError,
)
from lora_cache.events import BudgetEvent, Events, Eviction
from lora_cache.level import Level
from lora_cache.planner import Action, Granted, Planner, Resized, Start, Transition, Want
from lora_cache.planner.failures import again
from lora_cache.state import Tier
from lora_cache.store.locks import Hold

logger = logging.getLogger(__name__)

#: Between two looks at an engine whose slots others change.
_CALM_S = 0.25


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A caller that waits for its ticket; `want` is None for an unload."""

    future: asyncio.Future[Tier]
    key: AdapterKey
    want: Want | None


class Driver:
    """Feeds a planner with events, and its engine with the planner's transitions.

    One event loop.  Whoever waits may be cancelled at any time: that ends its wait, never a
    transition, which others may be waiting for.

    Args:
        adapter_of: the adapter to load for a key.
        hold: keeps an adapter's files where they are; None if they are gone.
        events: told of every copy that has lost its place, and of every change of a budget.
        clock: None for the event loop's own.

    Attributes:
        load_s: seconds that the engine spent on transitions that succeeded.
    """

    def __init__(
        self,
        planner: Planner,
        engine: Engine,
        adapter_of: Callable[[AdapterKey], Adapter],
        hold: Callable[[Adapter], Hold | None],
        events: Events,
        clock: Clock | None,
    ) -> None:
        self._planner = planner
        self._engine = engine
        self._adapter_of = adapter_of
        self._hold = hold
        self._events = events
        self._holds: dict[AdapterKey, Hold] = {}  # on files of what is resident, or coming
        self._clock = clock
        self._tickets = count(1)
        self._waiters: dict[int, _Waiter] = {}
        self._held_back: list[Start] | None = None  # while `reconcile` wants quiet
        self._transitions: set[asyncio.Task[None]] = set()
        self._timer: Timer | None = None
        self._refusal: LoraCacheError | None = CacheClosedError(
            "the cache is not open: use it inside `async with AsyncLoraCache(...)`"
        )
        self._look: Timer | None = None
        self._repairing: asyncio.Task[None] | None = None
        self.load_s = 0.0

    # ------------------------------------------------------------------ open, close

    @property
    def is_closed(self) -> bool:
        return isinstance(self._refusal, CacheClosedError)

    async def open(self) -> None:
        """Take the engine over and begin."""
        if self._clock is None:
            self._clock = LoopClock()
        await self._engine.attach()
        if self._engine.host_bytes is not None:
            self._planner.limit_host(self._engine.host_bytes)
        self._engine.watch(self._drifted)
        self._refusal = None

    def refuse(self, error: LoraCacheError) -> None:
        """From now on everything is refused; whoever waits is told so."""
        self._refusal = error
        waiters, self._waiters = self._waiters, {}
        for ticket, waiter in waiters.items():
            if not waiter.future.done():
                waiter.future.set_exception(again(error))
            self._perform(self._planner.cancel(ticket, self.now()))

    async def close(self) -> None:
        """Let transitions end, and give the engine back."""
        if self._look is not None:
            self._look.cancel()
        if self._repairing is not None:
            await asyncio.wait([self._repairing])
        while self._transitions:
            await asyncio.wait(self._transitions)
        if self._timer is not None:
            self._timer.cancel()
        for hold in self._holds.values():
            hold.release()
        self._holds.clear()
        await self._engine.detach()

    def require_open(self) -> None:
        """Raise what everybody is refused with, if they are."""
        if self._refusal is not None:
            raise again(self._refusal)

    def now(self) -> float:
        """Seconds on the cache's clock."""
        return self._require_clock().now()

    # ------------------------------------------------------------------ events

    async def acquire(
        self, adapter: Adapter, want: Want, timeout_s: float | None
    ) -> tuple[int, Tier]:
        """Get what `want` says, or raise.  Returns the ticket and the tier it was found in."""
        self.require_open()
        ticket, key = next(self._tickets), adapter.key
        nbytes = self._engine.charge(adapter)
        actions = self._planner.acquire(ticket, key, nbytes, self.now(), want)
        served_from = await self._wait(ticket, actions, key, want, timeout_s)
        if want is Want.LEASE:
            self._engine.begin_use(key)
        return ticket, served_from

    def release(self, ticket: int, key: AdapterKey) -> None:
        """End the lease that `ticket` was granted."""
        self._engine.end_use(key)
        self._perform(self._planner.release(ticket, self.now()))

    def unpin(self, key: AdapterKey) -> None:
        self._perform(self._planner.unpin(key, self.now()))

    def press(self, host: Level, gpu: Level) -> None:
        """Memory is as scarce as this now."""
        self._engine.conserve(host > Level.NONE)
        self._perform(self._planner.press(host, gpu, self.now()))

    async def unload(self, key: AdapterKey, timeout_s: float | None) -> None:
        """Drain and drop `key`; returns when it is gone."""
        self.require_open()
        ticket = next(self._tickets)
        actions = self._planner.unload(ticket, key, self.now())
        await self._wait(ticket, actions, key, None, timeout_s)

    async def reconcile(self) -> int:
        """Compare with what the engine holds, and repair; returns how many copies were off."""
        self.require_open()
        if self._held_back is not None:
            raise LoraCacheError("a reconcile is under way already")
        self._held_back = []
        before = self._planner.counters.drift
        actions: list[Action] = []
        try:
            while self._transitions:
                await asyncio.wait(self._transitions)
            holdings = await self._engine.holdings()
            actions = self._planner.reconcile(holdings, self.now())
            self._let_go(list(self._holds))
        finally:
            held, self._held_back = self._held_back, None
            for start in held:
                self._launch(start)
            self._perform(actions)
        return self._planner.counters.drift - before

    def _drifted(self) -> None:
        """The engine holds something else than we believe: look, when it has calmed down."""
        if self._look is None:
            self._look = self._require_clock().call_at(self.now() + _CALM_S, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        if self._held_back is not None:  # somebody is looking already
            self._drifted()
        elif self._refusal is None:
            self._repairing = asyncio.get_running_loop().create_task(
                self._repair(), name="lora-cache-repair"
            )

    async def _repair(self) -> None:
        try:
            await self.reconcile()
        except LoraCacheError as error:  # of an engine that has died: callers are told so
            logger.warning("what the engine holds could not be looked at: %s", error)

    # ------------------------------------------------------------------ waiting

    async def _wait(
        self,
        ticket: int,
        actions: list[Action],
        key: AdapterKey,
        want: Want | None,
        timeout_s: float | None,
    ) -> Tier:
        """Carry out `actions`, and wait until `ticket` is granted or refused."""
        only = actions[0] if len(actions) == 1 else None
        # The hot path: no future.  It may be the grant of another, whose drain was lifted.
        if isinstance(only, Granted) and only.ticket == ticket:
            return only.served_from
        waiter = _Waiter(asyncio.get_running_loop().create_future(), key, want)
        self._waiters[ticket] = waiter
        self._perform(actions)
        timer = None
        if timeout_s is not None:
            timer = self._require_clock().call_at(
                self.now() + timeout_s, lambda: self._time_out(waiter, timeout_s)
            )
        try:
            return await waiter.future
        except BaseException:  # above all CancelledError: this caller waits no longer
            if self._waiters.pop(ticket, None) is not None:
                self._perform(self._planner.cancel(ticket, self.now()))
            elif not waiter.future.cancelled() and waiter.future.exception() is None:
                # Granted in the very moment in which the caller was cancelled.
                self._give_back(ticket, waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _time_out(self, waiter: _Waiter, timeout_s: float) -> None:
        if waiter.future.done():
            return
        residency = self._planner.residency
        leased = ", ".join(sorted(key.name or str(key) for key in residency.leases)[:8])
        waiter.future.set_exception(
            LeaseTimeoutError(
                f"{waiter.key} was not ready within {timeout_s:g} s: {len(residency.leases)} of "
                f"{self._planner.limits.slots} slots are leased ({leased or 'none'}), "
                f"{len(residency.pins.gpu)} pinned, {self._planner.in_flight} loads under way",
                key=waiter.key,
            )
        )

    def _give_back(self, ticket: int, waiter: _Waiter) -> None:
        """Undo a grant that nobody waits for any more."""
        if waiter.want in (Want.PIN_GPU, Want.PIN_HOST):
            self._perform(self._planner.unpin(waiter.key, self.now()))
        else:
            self._perform(self._planner.release(ticket, self.now()))

    # ------------------------------------------------------------------ carrying out

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self._launch(action)
            elif isinstance(action, Resized):
                self._events.publish(BudgetEvent(self.now(), action.before, action.after))
            elif waiter := self._waiters.pop(action.ticket, None):
                if waiter.future.done():
                    if isinstance(action, Granted):
                        self._give_back(action.ticket, waiter)
                elif isinstance(action, Granted):
                    waiter.future.set_result(action.served_from)
                else:
                    waiter.future.set_exception(action.error)
        if self._planner.awaits_tick:
            self._arm()

    def _launch(self, start: Start) -> None:
        if self._held_back is not None:
            self._held_back.append(start)
            return
        name = f"lora-cache-{start.transition.op}"
        task = asyncio.get_running_loop().create_task(self._carry_out(start), name=name)
        self._transitions.add(task)
        task.add_done_callback(self._transitions.discard)

    async def _carry_out(self, start: Start) -> None:
        move, started = start.transition, self.now()
        demoted, dropped = frozenset(move.demote), frozenset(move.drop)
        try:
            await self._apply(move)
        except TransitionFailedError as failure:
            demoted, dropped = failure.demoted, failure.dropped
            actions = self._planner.failed(
                move.op,
                failure.error,
                self.now(),
                demoted=demoted,
                dropped=dropped,
            )
            if isinstance(failure.error, EngineDeadError):
                self.refuse(failure.error)
        else:
            cost_s = self.now() - started
            self.load_s += cost_s
            actions = self._planner.completed(move.op, cost_s, self.now(), self._taken_by(move))
        self._let_go(move.involved)
        for choice in start.choices:
            if choice.victim in (demoted | dropped if choice.tier is Tier.GPU else dropped):
                self._events.publish(Eviction.of(choice, move.load, self.now()))
        self._perform(actions)

    async def _apply(self, move: Transition) -> None:
        adapter = None if move.load is None else self._adapter_of(move.load)
        changed = AdapterChangedError(
            f"the files of {move.load} have changed: try again", key=move.load
        )
        if adapter is not None and not (self._keep(adapter) and adapter.is_unchanged()):
            raise TransitionFailedError(changed)
        try:
            await self._engine.apply(move, adapter)
            if adapter is not None and not adapter.is_unchanged():
                # The engine may have read a mixture: it must not answer under this key.
                await self._engine.apply(Transition(move.op, drop=(adapter.key,)), None)
                raise TransitionFailedError(
                    changed, demoted=move.demote, dropped=(*move.drop, adapter.key)
                )
        except TransitionFailedError:
            raise
        except Exception as error:
            # An engine that breaks its contract must not leave callers waiting for ever.
            logger.exception("the engine failed in an unexpected way")
            raise TransitionFailedError(EngineError(f"the engine failed: {error}")) from error

    def _taken_by(self, move: Transition) -> int | None:
        """What the newcomer takes in host memory, now that it is there."""
        return None if move.load is None else self._engine.charge(self._adapter_of(move.load))

    def _keep(self, adapter: Adapter) -> bool:
        """Let nobody take the files away while the adapter is resident: it may be loaded anew."""
        if adapter.key not in self._holds:
            if (hold := self._hold(adapter)) is None:
                return False
            self._holds[adapter.key] = hold
        return True

    def _let_go(self, keys: Iterable[AdapterKey]) -> None:
        """Of those that are not resident any more."""
        for key in keys:
            if key in self._holds and key not in self._planner.residency.host:
                self._holds.pop(key).release()

    def _arm(self) -> None:
        """Have the planner looked at again when somebody will have waited too long."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._refusal is not None:  # nobody waits, and nothing can be gained any more
            return
        deadline = self._planner.next_deadline(self.now())
        if deadline is not None:
            self._timer = self._require_clock().call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._perform(self._planner.tick(self.now()))

    def _require_clock(self) -> Clock:
        if self._clock is None:
            raise CacheClosedError("the cache was never opened")
        return self._clock
