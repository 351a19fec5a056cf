"""Tensor parallelism: two workers, each with its share of every adapter, commanded as one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from tests.real.engines import TWO_WORKERS
from tests.real.test_stock_engine import greedy, prompt

pytestmark = [pytest.mark.vllm, TWO_WORKERS]


def test_two_workers_answer_as_vllm_does(
    two_workers: tuple[Any, asyncio.Runner], adapters: list[Path]
) -> None:
    from vllm.lora.request import LoRARequest

    target, runner = two_workers
    chosen = adapters[:6]  # twice as many as slots

    async def native(target: Any) -> list[list[int]]:
        found = []
        for number, path in enumerate(chosen):
            lora = LoRARequest(lora_name=f"n{number}", lora_int_id=number + 1, lora_path=str(path))
            stream = target.generate(prompt(2), greedy(16), f"n{number}", lora_request=lora)
            outputs = [output async for output in stream]
            found.append(list(outputs[-1].outputs[0].token_ids))
        return found

    async def ours(target: Any) -> list[list[int]]:
        async with AsyncLoraCache(target, engine="resident", policy="lru", publish=False) as cache:

            async def ask(path: Path) -> list[int]:
                outputs = [out async for out in cache.generate(prompt(2), greedy(16), path)]
                return list(outputs[-1].outputs[0].token_ids)

            one_by_one = [await ask(path) for path in chosen]
            assert await asyncio.gather(*map(ask, chosen)) == one_by_one
            assert await cache.reconcile() == 0
            assert cache.stats().gpu_evictions >= 6
            images: Any = cache._engine._images  # type: ignore[attr-defined]
            taken = sum(images.get(key).nbytes for key in images)
            assert cache.snapshot().host_bytes == taken, "both shares of each"
            return one_by_one

    expected = runner.run(asyncio.wait_for(native(target), 100))
    assert runner.run(asyncio.wait_for(ours(target), 100)) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(chosen)
    assert runner.run(asyncio.wait_for(native(target), 100)) == expected, "given back"
