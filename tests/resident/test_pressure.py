"""Host memory grows scarce under a real vLLM: the arena shrinks, and every answer is right."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cache import BudgetEvent
from lora_cache.events import Event
from lora_cache.memory import Marks, Sampler
from tests.memory.test_sampler import FakeHost
from tests.resident.test_engine import answer, cache_of, run, stock_answer

pytestmark = pytest.mark.vllm

MARKS = Marks(dwell_s=0.3)
SLOTS, HOST = 3, 6


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_the_arena_shrinks_and_comes_back_while_requests_run(
    resident_llm: Any, llm: Any, adapters: list[Path]
) -> None:
    expected = [stock_answer(llm, path, 100 + number) for number, path in enumerate(adapters)]
    host, seen = FakeHost(), list[Event]()
    sampler = Sampler(None, host, period_s=0.05, max_share=1.0, host_marks=MARKS)

    async def main() -> None:
        async with cache_of(resident_llm, sampler=sampler, host_marks=MARKS) as cache:
            engine: Any = cache._engine
            cache.subscribe(seen.append)

            def taken() -> int:
                """What the system has given the arena, in bytes."""
                return os.fstat(engine._arena.fd).st_blocks * 512

            def images() -> int:
                return len(list(engine._images))

            for path in adapters:
                await answer(cache, path)
            await until(lambda: not engine._line.is_busy and images() == HOST)
            full, charged = taken(), cache.snapshot().host_bytes
            assert full >= charged > 0

            rng, served, stop = random.Random(0), list[int](), asyncio.Event()

            async def serve() -> None:
                while not stop.is_set():
                    number = rng.randrange(len(adapters))
                    assert await answer(cache, adapters[number]) == expected[number]
                    served.append(number)

            serving = [asyncio.ensure_future(serve()) for _ in range(4)]
            await asyncio.sleep(0.5)
            host.available = 1
            await until(lambda: images() <= SLOTS + 1)
            await until(lambda: not cache.snapshot().memory.speculates)
            await cache.prefetch(adapters)
            assert cache.stats().prefetches_refused > 0
            before = len(served)
            await until(lambda: len(served) > before + 20)
            stop.set()
            await asyncio.gather(*serving)  # raises if a request has failed
            for number in (0, 4, 8):  # of one rank: their images are alike
                assert await answer(cache, adapters[number]) == expected[number]
            await until(lambda: images() == SLOTS and not engine._line.is_busy)
            small = taken()
            assert small == engine._arena.used, "what was given back is the system's again"
            assert small < 0.7 * full

            host.available = 50
            await until(lambda: cache.snapshot().memory.host_bytes_now is None)
            for number, path in enumerate(adapters):
                assert await answer(cache, path) == expected[number]
            await until(lambda: not engine._line.is_busy and images() == HOST)
            assert taken() > small
            assert cache.stats().load_failures == 0
            assert cache.stats().given_back > 0
            assert await cache.reconcile() == 0

    with sampler:
        run(main())
    budgets = [event.after for event in seen if isinstance(event, BudgetEvent)]
    assert budgets[-1] is None
    assert None not in budgets[:-1]
    assert budgets[:-1] == sorted(budgets[:-1], key=lambda n: n or 0, reverse=True)
