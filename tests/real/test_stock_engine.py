"""The stock engine on a real, in-process vLLM: residency is exactly what the planner says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache, CopyState, Tier
from lora_cache.errors import (
    AdapterNotFoundError,
    ConfigError,
    EngineError,
    InvalidAdapterError,
    LeaseTimeoutError,
    LoadFailedError,
    LoraCacheError,
    PinnedError,
    UnsupportedAdapterError,
)
from lora_cache.policies import LFU, LRU, Policy
from lora_cache.testing import RandomPolicy
from tests.real.engines import Inside
from tests.real.parts import HIDDEN, write_adapter

pytestmark = pytest.mark.vllm


def greedy(tokens: int = 8) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def prompt(seed: int, length: int = 6) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {"prompt_token_ids": [rng.randrange(3, 250) for _ in range(length)]}


async def ask(cache: AsyncLoraCache, adapter: Path | None, seed: int = 0, tokens: int = 8) -> Any:
    outputs = [out async for out in cache.generate(prompt(seed), greedy(tokens), adapter)]
    return list(outputs[-1].outputs[0].token_ids)


def assert_agrees(cache: AsyncLoraCache, inside: Inside) -> None:
    """Our belief, the engine's mirror and vLLM's own tables are one (between transitions)."""
    keys = cache._engine._keys  # type: ignore[attr-defined]
    slots = {index: keys[number] for index, number in inside.slots().items()}
    residency = cache._planner.residency
    gpu, host = (
        {copy.key for copy in table if copy.state is not CopyState.LOADING}
        for table in (residency.gpu, residency.host)
    )
    assert dict(cache._engine.slots()) == slots
    assert gpu == set(slots.values())
    assert host == {keys[number] for number in inside.host()}


def plain(llm: Any, adapter: Path | None, seed: int, number: int, tokens: int = 8) -> list[int]:
    """What vLLM says without us."""
    from vllm.lora.request import LoRARequest

    request = adapter and LoRARequest(
        lora_name=f"plain-{number}", lora_int_id=number, lora_path=str(adapter)
    )
    (output,) = llm.generate([prompt(seed)], greedy(tokens), lora_request=request, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_tokens_equal_plain_vllm_and_differ_between_adapters(
    llm: Any, adapters: list[Path]
) -> None:
    expected = [plain(llm, adapter, 3, 100 + i) for i, adapter in enumerate(adapters)]
    base = plain(llm, None, 3, 0)

    async def main() -> None:
        async with AsyncLoraCache(llm, publish=False) as cache:
            got = await asyncio.gather(*(ask(cache, adapter, 3) for adapter in adapters))
            assert got == expected
            assert await ask(cache, None, 3) == base

    asyncio.run(main())
    assert len({tuple(tokens) for tokens in [base, *expected]}) == len(adapters) + 1


@pytest.mark.parametrize(
    "policy",
    [LRU, LFU, partial(RandomPolicy, 1), partial(RandomPolicy, 2)],
    ids=("lru", "lfu", "r1", "r2"),
)
@pytest.mark.long
def test_random_traffic_never_disagrees(
    llm: Any, adapters: list[Path], policy: Callable[[], Policy]
) -> None:
    """Hundreds of requests, leases, prefetches, pins and unloads, with requests running.

    After each transition: belief = mirror = vLLM's slots = `list_loras`; in the end vLLM has
    read from disk exactly as often as the planner says.
    """
    rng = random.Random(7)
    expected = [plain(llm, adapter, 3, 200 + i, 4) for i, adapter in enumerate(adapters)]
    for number in range(200, 200 + len(adapters)):
        llm.llm_engine.remove_lora(number)

    async def main() -> None:
        with Inside(llm) as inside:
            async with AsyncLoraCache(
                llm, policy=policy, drain_after_s=0.05, publish=False
            ) as cache:
                apply = cache._driver._apply

                async def checked(move: Any) -> None:
                    await apply(move)
                    asyncio.get_running_loop().call_soon(assert_agrees, cache, inside)

                cache._driver._apply = checked  # type: ignore[method-assign]
                failures: list[Any] = []
                asyncio.get_running_loop().set_exception_handler(
                    lambda _, context: failures.append(context)
                )

                async def one() -> None:
                    number = rng.choices(range(12), [1 / (i + 1) for i in range(12)])[0]
                    adapter, what = adapters[number], rng.random()
                    try:
                        if what < 0.6:
                            assert await ask(cache, adapter, 3, 4) == expected[number]
                        elif what < 0.75:
                            async with cache.lease(adapter, timeout_s=2.0):
                                await asyncio.sleep(rng.random() * 0.01)
                        elif what < 0.85:
                            await cache.prefetch(adapter)
                        elif what < 0.92:
                            await cache.pin(adapter, tier=rng.choice(["gpu", "host"]))
                            await asyncio.sleep(rng.random() * 0.02)
                            await cache.unpin(adapter)
                        else:
                            await cache.unload(adapter, timeout_s=2.0)
                    except (LeaseTimeoutError, PinnedError):
                        pass

                tasks: set[asyncio.Task[None]] = set()
                for _ in range(300):
                    tasks.add(asyncio.create_task(one()))
                    await asyncio.sleep(rng.random() * 0.01)
                    while len([task for task in tasks if not task.done()]) > 8:
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                        for task in [task for task in tasks if task.done()]:
                            tasks.remove(task)
                            task.result()
                await asyncio.gather(*tasks)
                assert not failures, failures[0]
                stats = cache.stats()
                assert len(inside.loads) == stats.disk_loads
                assert stats.gpu_evictions > 50
                assert stats.load_failures == 0
                assert await cache.reconcile() == 0
                assert_agrees(cache, inside)
            assert not inside.host()

    asyncio.run(main())


def test_under_lru_no_touch_is_needed(llm: Any, adapters: list[Path]) -> None:
    """The mirror is sharp enough to see that vLLM's own order is the planner's."""

    async def main() -> None:
        async with AsyncLoraCache(llm, policy="lru", publish=False) as cache:
            calls = 0
            add_lora = cache._engine._client.add_lora  # type: ignore[attr-defined]

            async def counted(request: Any) -> None:
                nonlocal calls
                calls += 1
                await add_lora(request)

            cache._engine._client.add_lora = counted  # type: ignore[attr-defined]
            for _ in range(3):
                for adapter in adapters[:6]:
                    await ask(cache, adapter)
            assert calls == cache.stats().activations == 18

    asyncio.run(main())


class TestFailures:
    @pytest.mark.parametrize(
        "what", ["missing", "malformed", "truncated", "rank", "widths", "timeout"]
    )
    def test_one_clear_error_and_nothing_else_changes(
        self, llm: Any, adapters: list[Path], tmp_path: Path, what: str
    ) -> None:
        bad = tmp_path / "bad"
        timeout_s: float | None = None
        error: type[LoraCacheError] = InvalidAdapterError
        if what == "missing":
            error = AdapterNotFoundError
        elif what == "rank":
            write_adapter(bad, rank=32)
            error = UnsupportedAdapterError
        elif what == "widths":  # vLLM would take it, and answer nonsense
            write_adapter(bad, hidden=HIDDEN // 2)
            error = UnsupportedAdapterError
        elif what == "timeout":
            write_adapter(bad, seed=99)  # the content of none of the others
            timeout_s, error = 0.05, LeaseTimeoutError
        else:
            file = "adapter_config.json" if what == "malformed" else "adapter_model.safetensors"
            whole = (write_adapter(bad) / file).read_bytes()
            (bad / file).write_bytes(whole[:-20])

        async def main() -> None:
            with Inside(llm) as inside:
                async with (
                    AsyncLoraCache(llm, publish=False) as cache,
                    cache.lease(adapters[0]),
                    cache.lease(adapters[1]),
                    cache.lease(adapters[2]),
                ):
                    before = (inside.slots(), inside.host(), len(inside.loads))
                    with pytest.raises(error, match="bad"):
                        async for _ in cache.generate(
                            prompt(0), greedy(), bad, timeout_s=timeout_s
                        ):
                            pass
                    assert (inside.slots(), inside.host(), len(inside.loads)) == before
                    assert sum(row.leases for row in cache.snapshot().adapters) == 3
                    assert cache.snapshot().waiting == 0
                    assert await ask(cache, adapters[1])
                    assert await cache.reconcile() == 0

        asyncio.run(main())

    def test_a_crash_of_vllm_s_load_costs_nobody_anything(
        self, llm: Any, adapters: list[Path], tmp_path: Path
    ) -> None:
        """Well formed for us, refused by vLLM: it targets a module that the model lacks."""
        bad = write_adapter(tmp_path / "bad")
        data = (bad / "adapter_model.safetensors").read_bytes()
        renamed = data.replace(b"self_attn.q_proj", b"self_attn.x_proj")
        (bad / "adapter_model.safetensors").write_bytes(renamed)

        async def main() -> None:
            with Inside(llm) as inside:
                async with AsyncLoraCache(llm, publish=False) as cache:
                    for adapter in adapters[:5]:
                        await ask(cache, adapter)
                    before = (inside.slots(), inside.host())
                    with pytest.raises(LoadFailedError, match="could not load bad@"):
                        await ask(cache, bad)
                    assert (inside.slots(), inside.host()) == before
                    with pytest.raises(LoadFailedError):  # fails fast
                        await ask(cache, bad)
                    assert len(inside.loads) == 6
                    assert await cache.reconcile() == 0
                    await ask(cache, adapters[6])
                    assert_agrees(cache, inside)

        asyncio.run(main())

    def test_a_load_that_dies_while_writing_the_slot_rolls_forward(
        self, llm: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """vLLM has evicted by then: the victim is demoted, nothing else is lost."""

        async def main() -> None:
            with Inside(llm) as inside:
                async with AsyncLoraCache(llm, publish=False) as cache:
                    for adapter in adapters[:3]:
                        await ask(cache, adapter)

                    def broken(*args: Any, **kwargs: Any) -> None:
                        raise RuntimeError("out of memory")

                    with monkeypatch.context() as patch:
                        for module in inside.manager.modules.values():
                            patch.setattr(module, "set_lora", broken, raising=False)
                        with pytest.raises(LoadFailedError, match="out of memory"):
                            await ask(cache, adapters[5])
                    assert_agrees(cache, inside)
                    assert len(inside.slots()) == 2
                    assert len(inside.host()) == 3
                    assert await cache.reconcile() == 0
                    for adapter in adapters[:3]:
                        await ask(cache, adapter)
                    assert_agrees(cache, inside)

        asyncio.run(main())

    def test_a_refused_request_leaks_no_lease(self, llm: Any, adapters: list[Path]) -> None:
        async def main() -> None:
            async with AsyncLoraCache(llm, publish=False) as cache:
                with pytest.raises(EngineError, match="refused"):
                    async for _ in cache.generate(prompt(0, 500), greedy(), adapters[0]):
                        pass
                assert all(row.leases == 0 for row in cache.snapshot().adapters)
                assert await ask(cache, adapters[0])

        asyncio.run(main())

    def test_an_abandoned_request_is_aborted(self, llm: Any, adapters: list[Path]) -> None:
        async def main() -> None:
            async with AsyncLoraCache(llm, publish=False) as cache:
                stream = cache.generate(prompt(0), greedy(100), adapters[0])
                await anext(stream)
                await stream.aclose()
                assert not llm.llm_engine.has_unfinished_requests()
                assert all(row.leases == 0 for row in cache.snapshot().adapters)

        asyncio.run(main())


def test_drift_behind_our_back_is_found_and_repaired(llm: Any, adapters: list[Path]) -> None:
    from vllm.lora.request import LoRARequest

    async def main() -> None:
        with Inside(llm) as inside:
            async with AsyncLoraCache(llm, publish=False) as cache:
                await ask(cache, adapters[0])
                (number,) = inside.host()
                llm.llm_engine.remove_lora(number)
                llm.llm_engine.add_lora(LoRARequest("foreign", 7, str(adapters[9])))
                assert await cache.reconcile() == 3  # slot, host memory, and the stranger
                await ask(cache, adapters[0])
                assert inside.host() == {number}
                assert await cache.reconcile() == 0

    asyncio.run(main())


def test_stock_cannot_stage_while_every_slot_is_in_use(llm: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        async with AsyncLoraCache(llm, publish=False) as cache:
            async with (
                cache.lease(adapters[0]),
                cache.lease(adapters[1]),
                cache.lease(adapters[2]),
            ):
                assert await cache.prefetch(adapters[3]) is Tier.DISK
            assert await cache.prefetch(adapters[3]) is Tier.GPU

    asyncio.run(main())


def test_one_manager_an_engine(llm: Any) -> None:
    async def main() -> None:
        async with AsyncLoraCache(llm, publish=False):
            with pytest.raises(ConfigError, match="already has a manager"):
                async with AsyncLoraCache(llm, publish=False):
                    pass
        async with AsyncLoraCache(llm, publish=False):
            pass

    asyncio.run(main())
