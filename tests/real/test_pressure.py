"""Host memory grows scarce under the stock engine: vLLM is made to forget what is idle."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.memory import Marks, Sampler
from tests.memory.test_sampler import FakeHost
from tests.real.engines import MAX_CPU_LORAS, MAX_LORAS
from tests.resident.test_engine import answer, run

pytestmark = pytest.mark.vllm


def test_vllm_holds_less_while_memory_is_scarce_and_answers_alike(
    llm: Any, adapters: list[Path]
) -> None:
    host = FakeHost()
    marks = Marks(dwell_s=0.2)
    sampler = Sampler(None, host, host_marks=marks)

    async def main() -> None:
        async with AsyncLoraCache(
            llm, engine="stock", policy="lru", publish=False, sampler=sampler, host_marks=marks
        ) as cache:

            def held() -> int:
                return len(llm.llm_engine.list_loras())

            expected = [await answer(cache, path) for path in adapters]
            assert held() == MAX_CPU_LORAS - 1
            host.available = 1
            sampler.sample()
            async with asyncio.timeout(30):
                while held() > MAX_LORAS:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert [await answer(cache, path) for path in adapters] == expected
            assert held() == MAX_LORAS
            assert await cache.reconcile() == 0

            host.available = 50
            sampler.sample()
            await asyncio.sleep(0.3)
            sampler.sample()
            assert [await answer(cache, path) for path in adapters] == expected
            assert held() == MAX_CPU_LORAS - 1
            stats = cache.stats()
            assert stats.load_failures == 0
            assert stats.given_back >= 3

    run(main())
