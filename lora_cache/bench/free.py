"""As many slots as there are, and loads for nothing: what waiting for a slot costs by itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from lora_cache.adapter import AdapterKey
from lora_cache.bench.servers import Ideal, Managed
from lora_cache.testing import FakeEngine


class _FreeSlots(FakeEngine):
    """An engine whose slots each hold an adapter that never leaves, whatever the planner thinks."""

    def __init__(self, resident: Ideal, host_entries: int, max_rank: int) -> None:
        super().__init__(resident.slots, host_entries, max_rank=max_rank)
        self._resident = resident

    async def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        slot = next(slot for slot, held in self.slots().items() if held == key)
        async for output in self._resident.stream(prompt, params, slot):
            yield output


class FreeLoads(Managed):
    """The planner's slots over plain vLLM, where an adapter is in its slot as soon as it may be.

    Between `ideal`, which has an adapter for each slot and so never waits for one, and the
    engines, which also load.

    Args:
        slots: of `engine`.
        max_rank: of `engine`.
    """

    def __init__(
        self, engine: Any, paths: Sequence[Path], slots: int, max_rank: int, **settings: Any
    ) -> None:
        self._resident = Ideal(engine, paths, slots)
        free = _FreeSlots(self._resident, len(paths), max_rank)
        super().__init__(free, paths, "free", **settings)

    async def open(self) -> None:
        if self.cache is None:
            await self._resident.fill([])
        await super().open()

    async def close(self) -> None:
        await super().close()
        await self._resident.close()
