"""What every engine must do, run on the fake and on real vLLM (`LLM` and `AsyncLLM`)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lora_cache import Adapter, AdapterKey, AdapterRef, Tier
from lora_cache.engines import Engine, TransitionFailedError, make_engine
from lora_cache.engines.resident.engine import ResidentEngine
from lora_cache.engines.stock import StockEngine
from lora_cache.errors import ConfigError, EngineError, LoadFailedError
from lora_cache.planner import Transition
from lora_cache.sources import LocalSource
from lora_cache.testing import FakeEngine, FakeSource
from tests.real.engines import (
    ASYNC_LLM,
    MAX_CPU_LORAS,
    MAX_LORAS,
    MAX_RANK,
    RESIDENT_ASYNC_LLM,
)
from tests.real.parts import write_adapter

SLOTS, HOST = MAX_LORAS, MAX_CPU_LORAS - 1
_ops = count(1)


@dataclass
class Bench:
    """An engine under test, and what it takes to use it."""

    target: Any
    make: Callable[[Any], Engine]
    runner: asyncio.Runner
    adapters: list[Adapter]
    broken: Adapter
    prompt: Any
    params: Any

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.runner.run(asyncio.wait_for(coroutine, 120))

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        engine = self.make(self.target)
        if isinstance(engine, FakeEngine):
            engine.fail_next("broken")
        await engine.attach()
        try:
            yield engine
        finally:
            await engine.detach()
            assert (await engine.holdings()).host == frozenset()


def _real_bench(
    target: Any,
    make: Callable[[Any], Engine],
    runner: asyncio.Runner,
    directories: list[Path],
    tmp: Path,
) -> Bench:
    from vllm import SamplingParams

    source = LocalSource()
    broken = write_adapter(tmp / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"attn.q_proj", b"attn.x_proj"))
    return Bench(
        target,
        make,
        runner,
        [source.resolve(AdapterRef.local(path)) for path in directories],
        source.resolve(AdapterRef.local(broken)),
        {"prompt_token_ids": [5, 6, 7, 8]},
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    )


@pytest.fixture(
    params=[
        "fake",
        pytest.param("stock-llm", marks=pytest.mark.vllm),
        pytest.param("stock-async-llm", marks=[pytest.mark.vllm, ASYNC_LLM]),
        pytest.param("resident-llm", marks=pytest.mark.vllm),
        pytest.param("resident-async-llm", marks=[pytest.mark.vllm, RESIDENT_ASYNC_LLM]),
    ]
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "fake":
        source = FakeSource()
        fake = FakeEngine(SLOTS, HOST, max_rank=MAX_RANK, tokens=20)
        with asyncio.Runner() as runner:
            adapters = [source.add(f"a{number}") for number in range(12)]
            yield Bench(fake, make_engine, runner, adapters, source.add("broken"), "?", None)
        return
    directories = request.getfixturevalue("adapters")
    kind, _, fixture = request.param.partition("-")
    make, prefix = (StockEngine, "") if kind == "stock" else (ResidentEngine, "resident_")
    target = request.getfixturevalue(prefix + fixture.replace("-", "_"))
    if fixture == "llm":
        with asyncio.Runner() as runner:
            yield _real_bench(target, make, runner, directories, tmp_path)
    else:
        yield _real_bench(target[0], make, target[1], directories, tmp_path)


def load(
    adapter: Adapter, *, demote: list[Adapter] | None = None, drop: list[Adapter] | None = None
) -> tuple[Transition, Adapter]:
    move = Transition(
        next(_ops),
        load=adapter.key,
        to=Tier.GPU,
        demote=tuple(victim.key for victim in demote or []),
        drop=tuple(victim.key for victim in drop or []),
    )
    return move, adapter


async def held(engine: Engine) -> tuple[set[AdapterKey], set[AdapterKey]]:
    holdings = await engine.holdings()
    assert dict(holdings.slots) == dict(engine.slots())
    return set(holdings.slots.values()), set(holdings.host)


async def answer(bench: Bench, engine: Engine, adapter: Adapter | None) -> str:
    key = None if adapter is None else adapter.key
    if key:
        engine.begin_use(key)
    stream = engine.generate(bench.prompt, bench.params, request_id=f"r{next(_ops)}", key=key)
    outputs = [output async for output in stream]
    if key:
        engine.end_use(key)
    assert outputs[-1].finished
    last = outputs[-1]
    return str(getattr(last, "text", None) or last.outputs[0].token_ids)


def test_capabilities_are_the_engine_s(bench: Bench) -> None:
    capabilities = bench.make(bench.target).capabilities
    assert capabilities.slots == SLOTS
    assert capabilities.host_entries == HOST
    assert capabilities.max_rank == MAX_RANK


def test_a_loaded_adapter_is_held_and_answers(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine() as engine:
            first, second = bench.adapters[:2]
            await engine.apply(*load(first))
            await engine.apply(*load(second))
            assert await held(engine) == ({first.key, second.key}, {first.key, second.key})
            assert sorted(engine.slots()) == [0, 1]
            texts = {await answer(bench, engine, each) for each in (first, second, None)}
            assert len(texts) == 3

    bench.run(main())


def test_no_more_is_taken_than_was_charged(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine() as engine:
            for adapter in bench.adapters[:3]:
                charged = engine.charge(adapter)
                await engine.apply(*load(adapter))
                assert 0 < engine.charge(adapter) <= charged

    bench.run(main())


def test_the_victim_leaves_its_slot_and_stays_in_host_memory(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine() as engine:
            a, b, c, d = bench.adapters[:4]
            for adapter in (a, b, c):
                await engine.apply(*load(adapter))
            # Not the oldest, and used a moment ago: what no LRU would evict.
            await answer(bench, engine, b)
            await engine.apply(*load(d, demote=[b]))
            assert await held(engine) == (
                {a.key, c.key, d.key},
                {a.key, b.key, c.key, d.key},
            )
            assert engine.slots()[1] == d.key
            await engine.apply(*load(b, demote=[a]))
            assert engine.slots()[0] == b.key

    bench.run(main())


def test_dropping_leaves_nothing(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine() as engine:
            a, b = bench.adapters[:2]
            await engine.apply(*load(a))
            await engine.apply(*load(b))
            await engine.apply(Transition(next(_ops), drop=(a.key,)), None)
            assert await held(engine) == ({b.key}, {b.key})

    bench.run(main())


def test_a_failing_load_changes_nothing(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine() as engine:
            residents = bench.adapters[:SLOTS]
            for adapter in residents:
                await engine.apply(*load(adapter))
            before = (dict(engine.slots()), await held(engine))
            with pytest.raises(TransitionFailedError) as caught:
                await engine.apply(*load(bench.broken, demote=[residents[0]]))
            assert isinstance(caught.value.error, LoadFailedError)
            assert not caught.value.demoted
            assert (dict(engine.slots()), await held(engine)) == before
            newcomer = bench.adapters[SLOTS]
            await engine.apply(*load(newcomer, demote=[residents[0]]))
            assert newcomer.key in (await held(engine))[0]

    bench.run(main())


def test_random_victims_in_both_tiers(bench: Bench) -> None:
    """The engine obeys whatever it is told, while requests run with adapters that stay."""

    async def main() -> None:
        rng = random.Random(11)
        async with bench.engine() as engine:
            slots: list[Adapter] = []
            host: list[Adapter] = []
            for _ in range(80 if isinstance(engine, FakeEngine) else 40):
                newcomer = rng.choice([a for a in bench.adapters if a not in slots])
                demote = [rng.choice(slots)] if len(slots) == SLOTS else []
                staying = [adapter for adapter in slots if adapter not in demote]
                drop = []
                if newcomer not in host and len(host) == HOST:
                    drop = [rng.choice([a for a in host if a not in staying])]
                running = [
                    asyncio.create_task(answer(bench, engine, adapter))
                    for adapter in rng.sample(staying, min(len(staying), rng.randrange(3)))
                ]
                await asyncio.sleep(0)
                await engine.apply(*load(newcomer, demote=demote, drop=drop))
                slots = [*staying, newcomer]
                host = [a for a in {*host, newcomer} if a not in drop]
                await asyncio.gather(*running)
                assert await held(engine) == (
                    {adapter.key for adapter in slots},
                    {adapter.key for adapter in host},
                )

    bench.run(main())


def test_closing_a_stream_aborts_the_request(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine() as engine:
            a, *others = bench.adapters[: SLOTS + 1]
            await engine.apply(*load(a))
            engine.begin_use(a.key)
            stream = engine.generate(bench.prompt, bench.params, request_id="early", key=a.key)
            await anext(stream)
            await stream.aclose()
            engine.end_use(a.key)
            for index, other in enumerate(others):
                demote = [a] if index == SLOTS - 1 else []
                await engine.apply(*load(other, demote=demote))
            assert a.key not in (await held(engine))[0]

    bench.run(main())


def test_a_second_manager_is_refused(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine():
            with pytest.raises(ConfigError, match="already has a manager"):
                await bench.make(bench.target).attach()

    bench.run(main())


@pytest.mark.vllm
def test_a_request_that_vllm_refuses_is_our_error(bench: Bench) -> None:
    async def main() -> None:
        if isinstance(bench.target, FakeEngine):
            pytest.skip("the fake refuses nothing")
        async with bench.engine() as engine:
            too_long = {"prompt_token_ids": [5] * 500}
            stream = engine.generate(too_long, bench.params, request_id="long", key=None)
            with pytest.raises(EngineError, match="refused the request"):
                await anext(stream)

    bench.run(main())
