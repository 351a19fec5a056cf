"""The disk tier as the event loop sees it: adapters come, and nobody blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.errors import CacheClosedError
from lora_cache.paths import cache_home
from lora_cache.policies import PolicyLike
from lora_cache.sources.base import Remote, RemoteSource
from lora_cache.store.fetch import Fetch
from lora_cache.store.pool import FetchPool, Urgency
from lora_cache.store.store import Store

_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one fetch is.

    Attributes:
        ref: what was asked for.
        done, total: bytes; `total` is 0 while it is not known.
    """

    ref: AdapterRef
    done: int
    total: int


class Interest:
    """Somebody's wish for an adapter; it can become urgent while it is being fulfilled."""

    def __init__(
        self, urgency: Urgency, progress: Callable[[Progress], None] | None = None
    ) -> None:
        self.urgency = urgency
        self.progress = progress
        self._tell: Callable[[], object] = lambda: None

    def hurry(self) -> None:
        """A lease waits for it now."""
        self.urgency = Urgency.LEASE
        self._tell()

    def attach(self, tell: Callable[[], object]) -> None:
        """Have `tell` called when it becomes urgent, in place of what was to be called before."""
        self._tell = tell


class DiskTier:
    """A store, and the pool that fills it.

    Args:
        root: directory of the store; ``store`` in `cache_home`, if None.
        max_bytes: budget for the store, or None.
        policy: who leaves when it is reached; see `Store`.
        workers: fetches at a time.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        max_bytes: int | None = None,
        policy: PolicyLike = "lru",
        workers: int = 4,
    ) -> None:
        self.store = Store(root or cache_home() / "store", max_bytes=max_bytes, policy=policy)
        self._pool = FetchPool(self.store, workers)

    async def bring(self, remote: Remote, source: RemoteSource, interest: Interest) -> Adapter:
        """The adapter of `remote`, fetched if it is not here.

        Cancelling ends the fetch, unless others wait for it; what has arrived is kept.
        """
        adapter = await asyncio.to_thread(self.store.find, remote.key)
        if adapter is None:
            adapter = await self._fetch(remote, source, interest)
        await asyncio.to_thread(self.store.remember, remote.ref, remote.key)
        return adapter

    async def _fetch(self, remote: Remote, source: RemoteSource, interest: Interest) -> Adapter:
        report = _reporter(remote.ref, interest)
        job = self._pool.join(Fetch(remote, source, report), interest.urgency)
        interest.attach(partial(self._pool.hurry, job, Urgency.LEASE))
        done = asyncio.wrap_future(job.future)
        done.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(done)  # others may wait for the same
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if job.future.cancelled() and not (task and task.cancelling()):
                raise CacheClosedError("the cache was closed") from None
            raise
        finally:
            self._pool.leave(job)

    async def last(self, ref: AdapterRef) -> Adapter | None:
        """What `ref` meant when it was last resolved, if that is here."""

        def look() -> Adapter | None:
            key = self.store.meaning(ref)
            return None if key is None else self.store.find(key)

        return await asyncio.to_thread(look)

    async def close(self) -> None:
        """Cancel all fetches; what has arrived is kept."""
        self._pool.close()
        await asyncio.to_thread(self._pool.wait_idle, _CLOSE_TIMEOUT_S)
        self.store.close()


def _reporter(ref: AdapterRef, interest: Interest) -> Callable[[Fetch], None]:
    """Carry progress from the fetching thread into the event loop."""
    progress = interest.progress
    if progress is None:
        return lambda _: None
    loop = asyncio.get_running_loop()

    def report(fetch: Fetch) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(progress, Progress(ref, fetch.done, fetch.total))

    return report
