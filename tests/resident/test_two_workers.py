"""Tensor parallelism: two workers, each with its share of every adapter, commanded as one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from tests.real.engines import start_async_llm
from tests.real.test_stock_engine import greedy, prompt

pytestmark = pytest.mark.vllm


def test_two_workers_answer_as_vllm_does(
    tiny_model: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    chosen = adapters[:6]  # twice as many as slots
    arguments = {"max_cpu_loras": 6, "tensor_parallel_size": 2}

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
            return one_by_one

    with start_async_llm(tiny_model, resident=True, **arguments) as (target, runner):
        expected = runner.run(asyncio.wait_for(native(target), 100))
        assert runner.run(asyncio.wait_for(ours(target), 100)) == expected
        assert len({tuple(tokens) for tokens in expected}) == len(chosen)
        assert runner.run(asyncio.wait_for(native(target), 100)) == expected, "given back"
