"""`AsyncLoraCache` over a real `AsyncLLM`, whose engine is another process."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.errors import EngineError, LeaseTimeoutError, LoadFailedError, PinnedError
from lora_cache.testing import RandomPolicy
from tests.real.engines import ASYNC_LLM, RESIDENT_ASYNC_LLM
from tests.real.parts import write_adapter
from tests.real.test_stock_engine import greedy, prompt

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("engine", "policy"),
    [
        pytest.param("stock", "lru", marks=ASYNC_LLM),
        pytest.param("stock", "random", marks=ASYNC_LLM),
        pytest.param("resident", "random", marks=RESIDENT_ASYNC_LLM),
    ],
)
def test_random_traffic_and_every_way_to_end_a_request(
    request: pytest.FixtureRequest, adapters: list[Path], engine: str, policy: str
) -> None:
    """Requests read to the end, left early, closed, cancelled, forgotten; loads that fail."""
    fixture = "async_llm" if engine == "stock" else "resident_async_llm"
    target, runner = request.getfixturevalue(fixture)
    rng = random.Random(5)

    async def main(broken: Path) -> None:
        chosen: Any = (lambda: RandomPolicy(3)) if policy == "random" else policy
        async with AsyncLoraCache(
            target,
            engine=engine,
            policy=chosen,
            drain_after_s=0.05,
            retry_s=0.05,
            publish=False,
        ) as cache:
            forgotten = []

            async def one() -> None:
                adapter = adapters[rng.choices(range(12), [1 / (i + 1) for i in range(12)])[0]]
                stream = cache.generate(prompt(3), greedy(12), adapter, timeout_s=100)
                way = rng.random()
                if way < 0.5:
                    outputs = [output async for output in stream]
                    assert outputs[-1].finished
                elif way < 0.65:
                    async with aclosing(stream):
                        async for _ in stream:
                            break
                elif way < 0.75:
                    await anext(stream)
                    forgotten.append(stream)  # still referenced, never read again
                elif way < 0.85:
                    task = asyncio.ensure_future(anext(stream))
                    await asyncio.sleep(rng.random() * 0.05)
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
                    await stream.aclose()
                elif way < 0.9:
                    with pytest.raises(LoadFailedError):
                        await anext(cache.generate(prompt(3), greedy(), broken))
                elif way < 0.95:
                    await cache.prefetch(adapter)
                else:
                    with suppress(PinnedError, LeaseTimeoutError):
                        await cache.unload(adapter, timeout_s=1)

            tasks = []
            for _ in range(200):
                tasks.append(asyncio.create_task(one()))
                await asyncio.sleep(rng.random() * 0.02)
                if rng.random() < 0.05:
                    assert await cache.reconcile() == 0
            await asyncio.gather(*tasks)
            # The slower the machine, the more of them wait together and share a load: now one after
            # the other.  An engine that evicts nobody runs into the time limit.
            while cache.stats().gpu_evictions <= 20:
                await one()
            # What was forgotten a moment ago decodes to its end, and holds its lease until then.
            async with asyncio.timeout(20):
                while any(row.leases for row in cache.snapshot().adapters):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await cache.reconcile() == 0
            stats = cache.stats()
            assert stats.requests > 120
            assert stats.drift == 0

    broken = write_adapter(adapters[0].parent / f"broken-{engine}-{policy}")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"attn.q_proj", b"attn.x_proj"))
    runner.run(asyncio.wait_for(main(broken), 200))


@ASYNC_LLM
def test_a_refused_request_is_ours_and_leaks_nothing(
    async_llm: tuple[Any, asyncio.Runner], adapters: list[Path]
) -> None:
    target, runner = async_llm

    async def main() -> None:
        async with AsyncLoraCache(target, publish=False) as cache:
            with pytest.raises(EngineError, match="refused the request"):
                await anext(cache.generate(prompt(0, 500), greedy(), adapters[0]))
            assert all(row.leases == 0 for row in cache.snapshot().adapters)
            outputs = [out async for out in cache.generate(prompt(0), greedy(), adapters[0])]
            assert outputs[-1].finished

    runner.run(main())
