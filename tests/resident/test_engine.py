"""From an adapter's files to a slot of a real vLLM, through planner, packer, arena and agent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lora_cache import AsyncLoraCache
from lora_cache.engines.managed import FOREIGN
from lora_cache.engines.resident.engine import ResidentEngine
from lora_cache.engines.resident.host_images import HostImages
from lora_cache.errors import ConfigError
from lora_cache.memory import HostMemory
from tests.real.parts import write_adapter
from tests.real.test_stock_engine import greedy, prompt
from tests.resident.asking import request, runner_of
from tests.resident.scripted import slot_tensors

pytestmark = pytest.mark.vllm


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 240))


def cache_of(llm: Any, **settings: Any) -> AsyncLoraCache:
    return AsyncLoraCache(llm, engine="resident", policy="lru", publish=False, **settings)


def in_slot(llm: Any, slot: int) -> list[torch.Tensor]:
    manager = runner_of(llm).lora_manager._adapter_manager
    return [tensor.clone() for tensor in slot_tensors(manager, slot)]


def native(llm: Any, path: Path, number: int) -> list[torch.Tensor]:
    """What stock vLLM has in the slot."""
    llm.llm_engine.add_lora(lora := request(number, path))
    manager = runner_of(llm).lora_manager._adapter_manager
    held = in_slot(llm, manager.lora_index_to_id.index(lora.lora_int_id))
    llm.llm_engine.remove_lora(lora.lora_int_id)
    return held


def is_ours(engine: ResidentEngine) -> bool:
    """Whether no slot holds what the cache has not brought in."""
    return not any(key.digest.startswith(FOREIGN) for key in engine.slots().values())


async def answer(cache: AsyncLoraCache, path: Path) -> list[int]:
    outputs = [output async for output in cache.generate(prompt(4), greedy(12), path)]
    return list(outputs[-1].outputs[0].token_ids)


def stock_answer(llm: Any, path: Path, number: int) -> list[int]:
    lora = request(number, path)
    (output,) = llm.generate([prompt(4)], greedy(12), lora_request=lora, use_tqdm=False)
    if lora.lora_int_id in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(lora.lora_int_id)
    return list(output.outputs[0].token_ids)


def test_every_slot_holds_what_vllm_would_put_there(
    resident_llm: Any, llm: Any, adapters: list[Path]
) -> None:
    """Twelve adapters of different ranks and targets through three slots, each slot used again."""
    expected = [native(llm, path, number) for number, path in enumerate(adapters)]

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            used = set()
            for number in [*range(12), *range(11, -1, -1)]:
                async with cache.lease(adapters[number]) as lease:
                    (slot,) = [s for s, key in cache._engine.slots().items() if key == lease.key]
                    assert all(map(torch.equal, in_slot(resident_llm, slot), expected[number]))
                used.add(slot)
            assert len(used) == 3
            assert await cache.reconcile() == 0

    run(main())


def test_what_the_packer_does_not_know_takes_the_slow_path(
    resident_llm: Any, llm: Any, adapters: list[Path], tmp_path: Path
) -> None:
    odd = write_adapter(
        tmp_path / "odd",
        seed=77,
        rank=8,
        targets=("q_proj",),
        config={"alpha_pattern": {"q_.*": 24}},
    )
    expected = native(llm, odd, 50)

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            engine: Any = cache._engine
            for _ in range(2):  # read once, then kept in the worker's memory
                async with cache.lease(odd) as lease:
                    (slot,) = [s for s, key in engine.slots().items() if key == lease.key]
                    assert all(map(torch.equal, in_slot(resident_llm, slot), expected))
                    assert engine._images._images[lease.key].room is None
                for path in adapters[:3]:
                    await answer(cache, path)
            stats = cache.stats()
            assert (stats.disk_loads, stats.activations) == (4, 5 + 3)
            await cache.unload(odd)
            assert await cache.reconcile() == 0

    run(main())


def test_with_little_memory_adapters_leave_in_time(
    resident_llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody said how much host memory there is: the engine looks, and the cache makes room."""
    monkeypatch.setattr("lora_cache.memory.host.Host.read", lambda _: HostMemory(1 << 40, 0))
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    paths = [
        write_adapter(tmp_path / f"large{number}", seed=number, rank=16, targets=every)
        for number in range(9)
    ]

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            budget = cache.snapshot().host_bytes_max
            assert budget is not None
            first = [await answer(cache, path) for path in paths]
            assert cache.stats().host_evictions >= 9 - 3  # as many of them fit as there are slots
            assert cache.snapshot().host_bytes <= budget
            assert [await answer(cache, path) for path in paths] == first
            assert cache.stats().load_failures == 0
            assert await cache.reconcile() == 0

    run(main())


def test_bytes_of_host_memory_are_those_of_images(resident_llm: Any, adapters: list[Path]) -> None:
    """Whatever the dtype of the files, of any ranks and targets."""

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            engine: Any = cache._engine
            for path in adapters:
                adapter = await cache._resolve(path)
                before = engine.charge(adapter)
                await answer(cache, path)
                images = engine._images
                assert 0 < engine.charge(adapter) == images.get(adapter.key).nbytes <= before
                taken = sum(images.get(key).nbytes for key in images)
                assert cache.snapshot().host_bytes == taken
            assert cache.stats().host_evictions > 0

    run(main())


def test_while_one_is_read_every_slot_serves(
    resident_llm: Any, llm: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stock_answer(llm, adapters[3], 4)
    pack = HostImages._pack

    async def main() -> None:
        begun, may_read = asyncio.Event(), asyncio.Event()

        async def when_it_may(images: HostImages, *args: Any) -> Any:
            begun.set()
            await may_read.wait()
            return await pack(images, *args)

        async with cache_of(resident_llm) as cache:
            first = [await answer(cache, path) for path in adapters[:3]]
            monkeypatch.setattr(HostImages, "_pack", when_it_may)
            cold = asyncio.ensure_future(answer(cache, adapters[3]))
            await begun.wait()
            assert [await answer(cache, path) for path in adapters[:3]] == first
            assert cache.stats().slot_hits == 3
            may_read.set()
            assert await cold == expected
            assert cache.stats().gpu_evictions == 1
            times = cache._engine.load_times[-1]  # type: ignore[attr-defined]
            assert times.packed > 0, "what reading took is told with the rest"
            assert times.commanded > 0
            assert await cache.reconcile() == 0

    run(main())


def test_staging_needs_no_slot(resident_llm: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            leases = [cache.lease(path) for path in adapters[:3]]
            for lease in leases:
                await lease.__aenter__()
            assert await cache.prefetch(adapters[5]) == "host"
            for lease in leases:
                await lease.__aexit__(None, None, None)
            await answer(cache, adapters[5])
            assert cache.stats().host_hits == 1

    run(main())


def test_a_request_without_a_lease_is_right_counted_and_repaired(
    resident_llm: Any, llm: Any, adapters: list[Path]
) -> None:
    expected = stock_answer(llm, adapters[7], 60)

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            engine: Any = cache._engine
            first = [await answer(cache, path) for path in adapters[:3]]
            assert stock_answer(resident_llm, adapters[7], 61) == expected
            async with asyncio.timeout(100):  # the cache is told, and looks
                while not (cache.stats().drift and is_ours(engine)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert engine.displaced
            assert dict(engine.slots()) == dict((await engine.holdings()).slots)
            assert [await answer(cache, path) for path in adapters[:3]] == first
            assert await cache.reconcile() == 0

    run(main())


def test_what_a_request_without_a_lease_uses_stays_until_it_has_ended(
    resident_llm: Any, llm: Any, adapters: list[Path]
) -> None:
    """However often the cache looks meanwhile: each drop would be one more load between steps."""
    expected = stock_answer(llm, adapters[7], 63)

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            engine: Any = cache._engine
            first = [await answer(cache, path) for path in adapters[:3]]
            inside = resident_llm.llm_engine
            raw = request(0, adapters[7], lora_int_id=63)
            inside.add_request("0", prompt(4), greedy(12), lora_request=raw)
            while inside.has_unfinished_requests():
                outputs = inside.step()
                await cache.reconcile()
            assert list(outputs[0].outputs[0].token_ids) == expected
            assert engine.displaced == 1
            assert not is_ours(engine)
            async with asyncio.timeout(100):  # nobody but the cache itself looks now
                while not is_ours(engine):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert [await answer(cache, path) for path in adapters[:3]] == first
            assert await cache.reconcile() == 0

    run(main())


def test_a_second_cache_reads_what_the_first_one_packed(
    resident_llm: Any, llm: Any, adapters: list[Path], tmp_path: Path
) -> None:
    expected = [stock_answer(llm, path, 80 + number) for number, path in enumerate(adapters[:6])]

    async def main() -> None:
        for packed, read in ((6, 0), (0, 6)):
            async with cache_of(resident_llm, image_dir=tmp_path / "images") as cache:
                line = cast(Any, cache._engine)._line
                for path, tokens in zip(adapters[:6], expected, strict=True):
                    assert await answer(cache, path) == tokens
                    while line.is_busy:  # noqa: ASYNC110 - what is not saved by the end is lost
                        await asyncio.sleep(0.01)
                assert (line.packed, line.read) == (packed, read)
        async with cache_of(resident_llm, image_bytes=0) as cache:
            assert await answer(cache, adapters[0]) == expected[0]
            assert cast(Any, cache._engine)._line.packed == 1

    run(main())


def test_loads_go_on_in_the_moment_in_which_a_request_without_a_lease_takes_a_slot(
    resident_llm: Any, llm: Any, adapters: list[Path]
) -> None:
    expected = [stock_answer(llm, path, 62 + number) for number, path in enumerate(adapters[:9])]

    async def main() -> None:
        async with cache_of(resident_llm) as cache:
            for path in adapters[:3]:
                await answer(cache, path)
            raw = request(0, adapters[7], lora_int_id=7)
            resident_llm.generate([prompt(4)], greedy(12), lora_request=raw, use_tqdm=False)
            await asyncio.sleep(0.05)  # it has been told, and has not looked yet
            engine: Any = cache._engine
            assert (engine.displaced, cache.stats().drift) == (1, 0)
            assert [await answer(cache, path) for path in adapters[3:7]] == expected[3:7]
            assert cache.stats().load_failures == 0
            await asyncio.sleep(0.6)
            assert [await answer(cache, path) for path in adapters[:9]] == expected
            assert await cache.reconcile() == 0

    run(main())


def test_a_vllm_without_the_switch_is_refused_clearly(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="LORA_CACHE_RESIDENT=1"):
            await ResidentEngine(llm).attach()
        with pytest.raises(ConfigError, match="LORA_CACHE_RESIDENT=1"):  # and not: has a manager
            await ResidentEngine(llm).attach()
        monkeypatch.setattr("vllm.version.__version__", "0.33.0")
        with pytest.raises(
            ConfigError, match=r"run with 0\.26 and 0\.32.*LORA_CACHE_RESIDENT=force"
        ):
            await ResidentEngine(llm).attach()

    run(main())


def test_host_bytes_bound_the_arena(resident_llm: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        async with cache_of(resident_llm, host_bytes="300KB") as cache:
            engine: Any = cache._engine
            for path in adapters:
                await answer(cache, path)
            assert cache.stats().host_evictions > 0
            assert engine._arena.used <= engine._arena.nbytes
            assert cache.stats().load_failures == 0

    run(main())
