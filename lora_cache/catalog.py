"""Every adapter that has been named so far: refs → adapters, keys → adapters."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachetools import TTLCache

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import (
    CacheClosedError,
    ConfigError,
    DiskFullError,
    LeaseTimeoutError,
    LoraCacheError,
    SourceError,
)
from lora_cache.sources import Remote, RemoteSource, Source, load_source
from lora_cache.store import DiskTier, Progress
from lora_cache.store.disk import Interest
from lora_cache.store.locks import Hold
from lora_cache.store.pool import Urgency
from lora_cache.threads import start
from lora_cache.turns import Turns

logger = logging.getLogger(__name__)

_ASKING = 16  # questions to one source at a time
_SPECULATING = 4  # of those that nobody waits for: to digest files takes cores and the disk
_STALE_S = 10.0  # between questions to a source that does not answer
_MAX_STALE = 100_000
_REMOVALS = 3  # how often another process may remove what was just fetched


@dataclass
class _Resolution:
    """One ref that is being resolved, and how many wait for it."""

    task: asyncio.Task[Adapter]
    interest: Interest
    waiting: int = 0


class Catalog:
    """Resolves refs, one resolution per ref at a time, and remembers what they meant.

    Used from one event loop; the reading happens in worker threads.

    Args:
        sources: by the name that refs carry.
        disk: where adapters of remote sources are brought to.
        accept: raises if the engine cannot serve an adapter; called before it is admitted.
        inspect: raises if the weights in a directory are no good; called once for each key, in a
            worker thread.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        disk: DiskTier,
        accept: Callable[[Adapter], None] = lambda _: None,
        inspect: Callable[[Path], None] | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._disk = disk
        self._accept = accept
        self._inspect = inspect
        self._by_ref: dict[AdapterRef, Adapter] = {}
        self._by_key: dict[AdapterKey, Adapter] = {}
        self._resolving: dict[AdapterRef, _Resolution] = {}
        self._stale: TTLCache[AdapterRef, Adapter] = TTLCache(_MAX_STALE, _STALE_S)
        # One source that does not answer is not to hold up the others.
        self._asking: defaultdict[str, Turns] = defaultdict(lambda: Turns(_ASKING, _SPECULATING))
        self._closed = False

    def __len__(self) -> int:
        return len(self._by_ref)

    def __getitem__(self, key: AdapterKey) -> Adapter:
        """The adapter to load for `key`: from wherever its content still is."""
        adapter = self._by_key[key]
        if not adapter.is_unchanged():
            same = (a for a in self._by_ref.values() if a.key == key and a.is_unchanged())
            adapter = self._by_key[key] = next(same, adapter)
        return adapter

    def get(self, key: AdapterKey) -> Adapter | None:
        return self._by_key.get(key)

    def current(self, ref: AdapterRef) -> Adapter | None:
        """What `ref` means, if that is known and still true."""
        adapter = self._by_ref.get(ref)
        if adapter is None:
            return None
        if self._stale.get(ref) is adapter and adapter.is_unchanged():
            return adapter  # its source did not answer a moment ago
        return adapter if self._sources[ref.source].is_current(ref, adapter) else None

    def last(self, ref: AdapterRef) -> Adapter | None:
        """What `ref` meant when it was last resolved, even if its files are gone."""
        return self._by_ref.get(ref)

    async def resolve(
        self,
        ref: AdapterRef,
        *,
        urgency: Urgency = Urgency.LEASE,
        progress: Callable[[Progress], None] | None = None,
    ) -> Adapter:
        """What `ref` means now, with its files on this machine.

        Cancelling a caller cancels only its wait; what nobody waits for any more is given up.

        Args:
            urgency: what a lease waits for overtakes what is speculation, both in the question to
                the source and in the fetch.
            progress: called on the event loop while the adapter is fetched; of several callers
                that share a fetch, the first one's.

        Raises:
            AdapterError: it is missing, malformed, denied, or cannot be served by this engine.
            SourceError: its source does not answer, and it is not on this machine.
            StoreError: there is no room for it on disk.
            CacheClosedError: `close` was called meanwhile.
        """
        if (adapter := self.current(ref)) is not None:
            self._register(adapter)
            return adapter
        resolution = self._resolving.get(ref)
        if resolution is None:
            interest = Interest(urgency, progress)
            task = asyncio.ensure_future(self._read(ref, interest))
            resolution = self._resolving[ref] = _Resolution(task, interest)
            task.add_done_callback(lambda done: self._resolved(ref, done))
        elif urgency is Urgency.LEASE:
            resolution.interest.hurry()
        resolution.waiting += 1
        try:
            return await asyncio.shield(resolution.task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._closed and not (caller and caller.cancelling()):
                raise CacheClosedError("the cache was closed") from None
            raise
        finally:
            resolution.waiting -= 1
            if not resolution.waiting and not resolution.task.done():
                self._forget(ref, resolution.task)
                resolution.task.cancel()

    async def resolve_held(self, ref: AdapterRef, timeout_s: float | None) -> tuple[Adapter, Hold]:
        """Resolve, and keep the files from being removed before the planner has seen them.

        Raises:
            as `resolve`, and
            LeaseTimeoutError: it was not on this machine within `timeout_s` seconds.
            DiskFullError: others removed it again and again.
        """
        for _ in range(_REMOVALS):
            try:
                async with asyncio.timeout(timeout_s):
                    found = await self.resolve(ref)
            except TimeoutError as error:
                raise LeaseTimeoutError(
                    f"{ref} was not on this machine within {timeout_s:g} s: prefetch it before "
                    "it is asked for"
                ) from error
            if (hold := self._disk.store.hold(found)) is not None:
                return found, hold
        raise DiskFullError(
            f"{ref} was removed from disk again and again before it was used: raise disk_bytes",
            key=found.key,
        )

    def close(self) -> None:
        """Give up what is being resolved."""
        self._closed = True
        for resolution in self._resolving.values():
            resolution.task.cancel()

    async def _read(self, ref: AdapterRef, interest: Interest) -> Adapter:
        source = self._sources.get(ref.source)
        if source is None:
            source = self._sources[ref.source] = load_source(ref, self._sources)
        try:
            adapter = await self._get(ref, source, interest)
        except SourceError as error:
            adapter = await self._last_known(ref, error)
        self._accept(adapter)
        if self._inspect is not None and adapter.key not in self._by_key:
            await asyncio.to_thread(self._inspect, adapter.path)
        self._by_ref[ref] = adapter
        self._register(adapter)
        return adapter

    async def _get(self, ref: AdapterRef, source: Source, interest: Interest) -> Adapter:
        try:
            async with self._asking[ref.source].taken(interest):
                found = await asyncio.wrap_future(start(source.resolve, ref))
            if isinstance(found, Remote):
                # The names of files and what is in them is made of these.
                f"{found.key.digest}{found.key.name}{ref.location}{ref.revision}".encode()
        except LoraCacheError:
            raise
        except Exception as error:  # a source that breaks its contract: still one clear error
            raise SourceError(f"{ref}: the source {ref.source!r} failed: {error}") from error
        if isinstance(found, Adapter):
            return found
        if not isinstance(source, RemoteSource):
            raise ConfigError(f"{type(source).__name__} finds adapters that it cannot fetch")
        return await self._disk.bring(found, source, interest)

    async def _last_known(self, ref: AdapterRef, error: SourceError) -> Adapter:
        """What `ref` meant when its source last answered, if that is on this machine."""
        adapter = self._by_ref.get(ref)
        if adapter is None or not adapter.is_unchanged():
            adapter = await self._disk.last(ref)
        if adapter is None:
            raise error
        logger.warning("%s; using %s, which it meant last", error, adapter.key.digest)
        self._stale[ref] = adapter
        return adapter

    def _register(self, adapter: Adapter) -> None:
        """Have `adapter` loaded for its key, unless the same content is known elsewhere.

        vLLM's prefix cache tells adapters apart by their path, too, so the first place that had
        the content is kept for as long as it has it.
        """
        first = self._by_key.get(adapter.key)
        if first is None or not first.is_unchanged():
            self._by_key[adapter.key] = adapter

    def _resolved(self, ref: AdapterRef, done: asyncio.Task[Adapter]) -> None:
        self._forget(ref, done)
        if not done.cancelled():
            done.exception()  # every caller may have left: the error is not an orphan

    def _forget(self, ref: AdapterRef, task: asyncio.Task[Adapter]) -> None:
        resolution = self._resolving.get(ref)
        if resolution is not None and resolution.task is task:
            del self._resolving[ref]
