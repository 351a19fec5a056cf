"""How an adapter gets into the state in which it arrives, and into its slot."""

from __future__ import annotations

from typing import Any

from lora_cache.bench.servers import Managed, Plain


class PlainWay:
    """VLLM by itself."""

    kinds = ("cold", "host", "slot")

    def __init__(self, server: Plain) -> None:
        self.server = server

    async def resolve(self, adapter: int) -> None:
        """Nothing is digested here."""

    async def to_slot(self, adapter: int) -> None:
        await self.server.engine.add_lora(self.server.requests[adapter])

    async def prepare(self, kind: str, adapter: int) -> None:
        """For "host" as many others come after it as there are slots."""
        if kind == "slot":
            await self.to_slot(adapter)

    async def pack(self, adapters: list[int]) -> bool:
        """Leave these as packed images on disk only; returns whether that is possible."""
        return False


class ManagedWay:
    """VLLM under a cache."""

    def __init__(self, server: Managed) -> None:
        self.server = server
        self.packs = server.kind == "resident"
        self.kinds = ("cold", "packed", "host", "slot") if self.packs else PlainWay.kinds

    async def resolve(self, adapter: int) -> None:
        """Read and digest its files, unless that was done."""
        await self.server.cache.prefetch(self.server.paths[adapter], tier="disk")

    async def to_slot(self, adapter: int) -> None:
        async with self.server.cache.lease(self.server.paths[adapter]):
            pass

    async def prepare(self, kind: str, adapter: int) -> None:
        cache: Any = self.server.cache
        if kind == "cold":
            return
        if kind == "packed":
            await self.pack([adapter])
            return
        await cache.prefetch(self.server.paths[adapter], tier="host")
        if kind == "slot":
            await self.to_slot(adapter)

    async def pack(self, adapters: list[int]) -> bool:
        """Leave these as packed images on disk only; returns whether that is possible.

        Raises:
            TimeoutError: their images were not written.
        """
        if not self.packs:
            return False
        cache: Any = self.server.cache
        for adapter in adapters:
            path = self.server.paths[adapter]
            await cache.unload(path)
            await cache.prefetch(path, tier="host")  # when many came at once, not all were kept
            await self.server.written()
            await cache.unload(path)
        return True
