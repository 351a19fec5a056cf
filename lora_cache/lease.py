"""Leases: counted, scoped use of an adapter in a slot."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from lora_cache.adapter import Adapter, AdapterKey, AdapterLike
from lora_cache.errors import LoraCacheError
from lora_cache.state import Tier

if TYPE_CHECKING:
    from lora_cache.cache import AsyncLoraCache


class Lease:
    """An adapter that stays in its slot until the ``async with`` block is left.

    Made by `AsyncLoraCache.lease`; good for one block.  Requests that carry `request` must have
    ended by then: close generators before leaving.

    Attributes are there inside the block.

    Attributes:
        adapter: what the ref resolved to; `key` is its immutable identity.
        request: what vLLM needs to run with it (a ``LoRARequest``).
        served_from: the tier it was found in: ``GPU`` is a slot hit.
        waited_s: seconds that entering took.
    """

    __slots__ = ("_cache", "_ref", "_ticket", "_timeout_s", "adapter", "served_from", "waited_s")

    adapter: Adapter
    served_from: Tier
    waited_s: float

    def __init__(self, cache: AsyncLoraCache, ref: AdapterLike, timeout_s: float | None) -> None:
        self._cache = cache
        self._ref = ref
        self._timeout_s = timeout_s
        self._ticket: int | None = None

    @property
    def key(self) -> AdapterKey:
        return self.adapter.key

    @property
    def request(self) -> Any:
        return self._cache.handle(self.adapter.key)

    async def __aenter__(self) -> Lease:
        if self._ticket is not None:
            raise LoraCacheError("a lease is good for one block: ask for another one")
        grant = await self._cache.acquire_lease(self._ref, self._timeout_s)
        self._ticket, self.adapter, self.served_from, self.waited_s = grant
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Give the adapter back; does nothing the second time."""
        if self._ticket:
            self._cache.release_lease(self._ticket, self.adapter.key)
            self._ticket = 0
