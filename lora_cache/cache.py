"""`AsyncLoraCache`: the planner's hands.  It runs what the planner decides, and waits for it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, Unpack, overload

from lora_cache.adapter import Adapter, AdapterKey, AdapterLike, AdapterRef, as_ref, several
from lora_cache.catalog import Catalog
from lora_cache.clock import Clock
from lora_cache.config import CacheConfig, CacheSettings
from lora_cache.driver import Driver
from lora_cache.engines import make_engine
from lora_cache.errors import (
    CacheClosedError,
    ConfigError,
    NoRoomError,
)
from lora_cache.events import Event, Events
from lora_cache.feed import Feed
from lora_cache.fit import check_fit
from lora_cache.lease import Lease
from lora_cache.memory import Sampler
from lora_cache.planner import Planner, Want
from lora_cache.policies import make_policy
from lora_cache.setup import disk_tier, limits_of
from lora_cache.sources import Source, default_sources
from lora_cache.state import Tier
from lora_cache.status import StatusFile
from lora_cache.store import Progress
from lora_cache.store.pool import Urgency
from lora_cache.views import Snapshot, Stats, memory_of, snapshot_of
from lora_cache.watch import MemoryWatch, make_sampler
from lora_cache.weights import check_finite

logger = logging.getLogger(__name__)

_Grant = tuple[int, Adapter, Tier, float]


class AsyncLoraCache:
    """Keeps adapters where a policy wants them, and lends them to requests.

    ```python
    async with AsyncLoraCache(async_llm, policy="lfu") as cache:
        async for output in cache.generate(prompt, params, adapter="adapters/sql"):
            ...
    ```

    Args:
        target: a `vllm.AsyncLLM`, a `vllm.LLM`, or an engine of the `Engine` protocol.  It stays
            the caller's: closing the cache leaves it running, without adapters.
        sources: sources by the name that refs carry, beside or instead of ``"local"`` and
            ``"hub"``; those of installed entry points (``lora_cache.sources``) are found by name.
        clock: for tests.
        sampler: what tells of scarce memory, instead of one of the cache's own; it stays the
            caller's, so several caches may share one.
        settings: see `CacheConfig`.

    Raises:
        ConfigError: a setting is unknown, or contradicts the engine.

    All methods belong to one event loop and its thread.  Adapters are named by path, by
    ``org/name[@revision]``, or by `AdapterRef`.
    """

    def __init__(
        self,
        target: Any,
        *,
        sources: dict[str, Source] | None = None,
        clock: Clock | None = None,
        sampler: Sampler | None = None,
        **settings: Unpack[CacheSettings],
    ) -> None:
        self.config = CacheConfig.of(settings)
        config = self.config
        self._engine = make_engine(
            target, config.engine, config.host_bytes, config.image_dir, config.image_bytes
        )
        self._limits = limits_of(self.config, self._engine.capabilities)
        self._planner = Planner(
            self._limits,
            make_policy(self.config.policy),
            make_policy(self.config.host_policy or self.config.policy),
            explains=True,
        )
        self._events = Events()
        self._disk = disk_tier(self.config)
        self._catalog = Catalog(
            default_sources() | (sources or {}),
            self._disk,
            partial(check_fit, self._engine.capabilities),
            check_finite if self.config.check_weights else None,
        )
        self._driver = Driver(
            self._planner,
            self._engine,
            self._catalog.__getitem__,
            self._disk.store.hold,
            self._events,
            clock,
        )
        self._memory = MemoryWatch(
            sampler or make_sampler(config),
            owned=sampler is None,
            gpus=self._engine.capabilities.tensor_parallel,
            press=self._driver.press,
            events=self._events,
            now=self._driver.now,
        )
        self._feeds: set[Feed] = set()
        self._status: StatusFile | None = None
        self._request_ids = count(1)
        self._waited_s = 0.0

    # ------------------------------------------------------------------ open, close

    async def __aenter__(self) -> AsyncLoraCache:
        await self._driver.open()
        if self.config.publish:
            from lora_cache.plan.claims import claims_of  # planning is not for everybody

            self._status = StatusFile(self, claims_of(self._engine))
            self._status.start()
        self._memory.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Refuse new work, abort running requests, let loads end, give the engine back.

        Idempotent.  Adapters under leases that are still held elsewhere stay in the engine.
        """
        if self._driver.is_closed:
            return
        self._driver.refuse(CacheClosedError("the cache is closed"))
        await self._memory.close()
        await asyncio.gather(*(feed.close() for feed in list(self._feeds)))
        if self._status is not None:
            await self._status.close()
        self._catalog.close()
        await self._disk.close()
        await self._driver.close()

    # ------------------------------------------------------------------ requests

    async def generate(
        self,
        prompt: Any,
        params: Any,
        adapter: AdapterLike | None = None,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Any, None]:
        """Lease the adapter, stream one request, end the lease when vLLM is done with it.

        Args:
            prompt: as vLLM's ``generate`` takes it.
            params: likewise.
            adapter: None for the base model.
            timeout_s: how long to wait for the adapter (the setting `lease_timeout_s`, if None).
            options: more of what vLLM's ``generate`` takes.

        Yields:
            vLLM's outputs (``RequestOutput``).

        Raises:
            AdapterError: it does not exist or cannot be served.
            LeaseTimeoutError: no slot came free in `timeout_s` seconds.
            EngineError: vLLM could not load it, or refused the request.
            CacheClosedError: the cache is closed, or was closed meanwhile.

        A consumer that stops early should close the generator (``contextlib.aclosing``): that
        aborts the request.  One that merely stops reading holds no slot: the lease ends with the
        request.
        """
        self._driver.require_open()
        if request_id is None:
            request_id = f"lora-cache-{next(self._request_ids)}"
        lease = key = None
        if adapter is not None:
            lease = await self.lease(adapter, timeout_s=timeout_s).__aenter__()
            key = lease.key
        stream = self._engine.generate(prompt, params, request_id=request_id, key=key, **options)
        feed = Feed(stream, lease)
        self._feeds.add(feed)
        try:
            async for output in feed:
                yield output
        finally:
            self._feeds.discard(feed)
            await feed.close()

    def lease(self, adapter: AdapterLike, *, timeout_s: float | None = None) -> Lease:
        """Hold an adapter in a slot for the length of an ``async with`` block.

        Raises on entering, not here.

        Raises:
            LeaseTimeoutError: no slot came free in `timeout_s` seconds.
            AdapterError: it does not exist or cannot be served.
            LoadFailedError: the engine could not load it; nobody was evicted.
        """
        return Lease(self, adapter, timeout_s)

    @overload
    async def prefetch(  # type: ignore[overload-overlap]  # a str is an Iterable[str], too
        self,
        adapters: AdapterLike,
        *,
        tier: Tier | str = ...,
        progress: Callable[[Progress], None] | None = ...,
    ) -> Tier: ...

    @overload
    async def prefetch(
        self,
        adapters: Iterable[AdapterLike],
        *,
        tier: Tier | str = ...,
        progress: Callable[[Progress], None] | None = ...,
    ) -> dict[str, Tier]: ...

    async def prefetch(
        self,
        adapters: AdapterLike | Iterable[AdapterLike],
        *,
        tier: Tier | str = Tier.HOST,
        progress: Callable[[Progress], None] | None = None,
    ) -> Tier | dict[str, Tier]:
        """Bring adapters nearer before they are asked for, disturbing nobody who holds a lease.

        A few are fetched, digested and loaded at a time.  A lease overtakes them, even one on an
        adapter among them, if its load has not begun.

        Args:
            adapters: one, or several.
            tier: ``"disk"`` or ``"host"``.
            progress: called on the event loop while something is fetched.

        Returns:
            The tier that it is in now; of several, by the name that each was given.
            ``Tier.DISK`` although ``"host"`` was wanted means that there was no room that nobody
            needs (the stock engine cannot stage without an idle slot), or that memory is scarce
            (`Stats.prefetches_refused`).

        Raises:
            AdapterError, SourceError, StoreError: of several, the first one's, after the others
                have come.

        Cancelling ends the fetches that nobody else waits for; what has arrived is kept.
        """
        wanted = _tier(tier, Tier.DISK, Tier.HOST)
        if isinstance(adapters, str | os.PathLike | AdapterRef):
            return await self._prefetch(adapters, wanted, progress)
        names = several(adapters)
        tasks = [asyncio.ensure_future(self._prefetch(each, wanted, progress)) for each in names]
        try:
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return dict(zip(map(str, names), outcomes, strict=True))  # type: ignore[arg-type]

    async def _prefetch(
        self, adapter: AdapterLike, wanted: Tier, progress: Callable[[Progress], None] | None
    ) -> Tier:
        found = await self._resolve(adapter, urgency=Urgency.SPECULATION, progress=progress)
        if wanted is Tier.HOST:
            with suppress(NoRoomError):
                await self._acquire(found, Want.STAGE, None)
        return self._planner.residency.found_in(found.key)

    async def warm(self, adapters: AdapterLike | Iterable[AdapterLike]) -> dict[str, Tier]:
        """Fill slots and host memory with these adapters, the most important ones first.

        The first ones end up in slots, the next ones in host memory, as far as there is room;
        the rest is only validated.  Returns the tier of each, by the name it was given.

        Raises:
            AdapterError, SourceError, StoreError: of several, the first one's; none is loaded.
        """
        names = several(adapters)
        await self.prefetch(names, tier="disk")  # several at a time
        named = [(str(adapter), await self._resolve(adapter)) for adapter in names]
        fitting = named[: self._limits.host_entries]
        for index, (_, adapter) in reversed(list(enumerate(fitting))):
            if index < self._limits.slots:
                ticket, _ = await self._acquire(adapter, Want.LEASE, None)
                self.release_lease(ticket, adapter.key)
            else:
                with suppress(NoRoomError):
                    await self._acquire(adapter, Want.STAGE, None)
        return {name: self._planner.residency.found_in(a.key) for name, a in named}

    async def pin(
        self,
        adapter: AdapterLike,
        *,
        tier: Tier | str = Tier.GPU,
        timeout_s: float | None = None,
    ) -> None:
        """Bring an adapter into `tier` (``"gpu"`` or ``"host"``) and keep it there.

        Raises:
            PinnedError: one slot (and one host entry) must stay unpinned.
            MemoryPressureError: memory is scarce; pins that exist stay.
        """
        gpu = _tier(tier, Tier.GPU, Tier.HOST) is Tier.GPU
        want = Want.PIN_GPU if gpu else Want.PIN_HOST
        await self._acquire(await self._resolve(adapter), want, timeout_s)

    async def unpin(self, adapter: AdapterLike) -> None:
        """Withdraw the pin; the adapter stays until the policy picks it.  No pin is fine."""
        # What it meant when it was resolved: this must work when the files are gone.
        if (found := self._catalog.last(as_ref(adapter))) is not None:
            self._driver.unpin(found.key)

    async def unload(self, adapter: AdapterLike, *, timeout_s: float | None = None) -> None:
        """Let no new request have it, wait for those that do, then drop it from GPU and host.

        Requests that come meanwhile wait, and load it anew.

        Raises:
            PinnedError: unpin it first.
            LeaseTimeoutError: it was still leased after `timeout_s` seconds, and stays.
        """
        if (found := self._catalog.last(as_ref(adapter))) is not None:
            await self._driver.unload(found.key, timeout_s)

    # ------------------------------------------------------------------ questions

    def stats(self) -> Stats:
        """Counts since the cache was opened."""
        return Stats.of(self._planner.counters, waited_s=self._waited_s, load_s=self._driver.load_s)

    def snapshot(self) -> Snapshot:
        """Who is where, right now.  Cost grows with what is resident, not with what is known."""
        now = self._driver.now()
        memory = memory_of(self._planner, self._events, self._memory.levels)
        return snapshot_of(self._planner, self._catalog, self._engine, self._events, memory, now)

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Have `listener` called with every event, on the event loop; it must not block.

        An `Eviction` for each copy that lost its place, a `PressureEvent` when memory grows scarce
        or is so no longer, a `BudgetEvent` when what host memory may hold changes with that.

        Returns what ends the subscription.  A listener that fails is logged.
        """
        return self._events.subscribe(listener)

    async def reconcile(self) -> int:
        """Compare with what the engine really holds; repair.  Returns how many copies were off.

        Waits until no transition is in flight; new ones are held back meanwhile.
        """
        return await self._driver.reconcile()

    def handle(self, key: AdapterKey) -> Any:
        """What a request must carry to run with `key`, which must be leased."""
        return self._engine.handle(key)

    # ------------------------------------------------------------------ leases (see lease.py)

    async def acquire_lease(self, ref: AdapterLike, timeout_s: float | None) -> _Grant:
        """Resolve, wait for a slot, and count a lease; `Lease` is the way to use it."""
        self._driver.require_open()
        started = self._driver.now()
        timeout_s = self.config.lease_timeout_s if timeout_s is None else timeout_s
        adapter = self._catalog.current(as_ref(ref))
        if adapter is None or adapter.key not in self._planner.residency.host:
            adapter, hold = await self._catalog.resolve_held(as_ref(ref), timeout_s)
            if timeout_s is not None:  # it counts from when the lease was asked for
                timeout_s = max(0.0, timeout_s - (self._driver.now() - started))
            with hold:
                ticket, served_from = await self._acquire(adapter, Want.LEASE, timeout_s)
        else:  # the hot path: what is resident is held already
            ticket, served_from = await self._acquire(adapter, Want.LEASE, timeout_s)
        waited_s = self._driver.now() - started
        self._waited_s += waited_s
        return ticket, adapter, served_from, waited_s

    def release_lease(self, ticket: int, key: AdapterKey) -> None:
        """End the lease that `ticket` was granted."""
        self._driver.release(ticket, key)

    async def _acquire(
        self, adapter: Adapter, want: Want, timeout_s: float | None
    ) -> tuple[int, Tier]:
        if timeout_s is None:
            timeout_s = self.config.lease_timeout_s
        return await self._driver.acquire(adapter, want, timeout_s)

    # ------------------------------------------------------------------ small things

    async def _resolve(self, adapter: AdapterLike, **options: Any) -> Adapter:
        self._driver.require_open()
        return await self._catalog.resolve(as_ref(adapter), **options)


def _tier(tier: Tier | str, *allowed: Tier) -> Tier:
    for known in allowed:
        if tier == known:
            return known
    raise ConfigError(f"tier={str(tier)!r}: choose one of {', '.join(allowed)}")
