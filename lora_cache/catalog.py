"""Every adapter that has been named so far: refs → adapters, keys → adapters."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import AdapterNotFoundError
from lora_cache.sources import Source

#: How a caller may name an adapter.
AdapterLike = AdapterRef | str | os.PathLike[str]


class Catalog:
    """Resolves refs, one resolution per ref at a time, and remembers what they meant.

    Used from one event loop; the reading happens in worker threads.

    Args:
        sources: by the name that refs carry.
        accept: raises if the engine cannot serve an adapter; called before it is admitted.
        inspect: raises if the weights in a directory are no good; called once for each key, in a
            worker thread.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        accept: Callable[[Adapter], None],
        inspect: Callable[[Path], None] | None = None,
    ) -> None:
        self._sources = sources
        self._accept = accept
        self._inspect = inspect
        self._by_ref: dict[AdapterRef, Adapter] = {}
        self._by_key: dict[AdapterKey, Adapter] = {}
        self._resolving: dict[AdapterRef, asyncio.Future[Adapter]] = {}

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
        if adapter is None or not self._sources[ref.source].is_current(ref, adapter):
            return None
        return adapter

    def last(self, ref: AdapterRef) -> Adapter | None:
        """What `ref` meant when it was last resolved, even if its files are gone."""
        return self._by_ref.get(ref)

    async def resolve(self, ref: AdapterRef) -> Adapter:
        """What `ref` means now.

        Cancelling a caller cancels only its wait, not the resolution that others share.

        Raises:
            AdapterError: it is missing, malformed, or cannot be served by this engine.
        """
        if (adapter := self.current(ref)) is not None:
            self._register(adapter)
            return adapter
        future = self._resolving.get(ref)
        if future is None:
            future = asyncio.ensure_future(self._read(ref))
            self._resolving[ref] = future
            future.add_done_callback(lambda done: self._resolved(ref, done))
        return await asyncio.shield(future)

    async def _read(self, ref: AdapterRef) -> Adapter:
        source = self._sources.get(ref.source)
        if source is None:
            known = ", ".join(sorted(self._sources))
            raise AdapterNotFoundError(
                f"{ref}: no source named {ref.source!r} is configured (there is: {known})"
            )
        adapter = await asyncio.to_thread(source.resolve, ref)
        self._accept(adapter)
        if self._inspect is not None and adapter.key not in self._by_key:
            await asyncio.to_thread(self._inspect, adapter.path)
        self._by_ref[ref] = adapter
        self._register(adapter)
        return adapter

    def _register(self, adapter: Adapter) -> None:
        """Have `adapter` loaded for its key, unless the same content is known elsewhere.

        vLLM's prefix cache tells adapters apart by their path, too, so the first place that had
        the content is kept for as long as it has it.
        """
        first = self._by_key.get(adapter.key)
        if first is None or not first.is_unchanged():
            self._by_key[adapter.key] = adapter

    def _resolved(self, ref: AdapterRef, done: asyncio.Future[Adapter]) -> None:
        del self._resolving[ref]
        if not done.cancelled():
            done.exception()  # every caller may have left: the error is not an orphan
