"""A cache under memory pressure: a fake host, fake GPUs, a manual clock, a fake engine."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_cache import AsyncLoraCache, BudgetEvent, Eviction, Tier
from lora_cache.cli import app
from lora_cache.config import CacheConfig
from lora_cache.errors import ConfigError, MemoryPressureError
from lora_cache.events import Event
from lora_cache.level import Level
from lora_cache.memory import Gpus, Marks, PressureEvent, Sampler
from lora_cache.status import StatusFile, read_status
from lora_cache.testing import FakeEngine, FakeGpu, FakeNvml, FakeSource, settle
from lora_cache.watch import make_sampler
from tests.memory.clock import Seconds
from tests.memory.test_sampler import GIB, FakeHost
from tests.test_cache import World, ref, run, world

DWELL_S = 10.0
NAMES = [f"n{number}" for number in range(12)]
EASY, TIGHT, FULL = 50, 8, 1  # of 100 bytes of host memory are available


class Machine:
    """Memory that the test decides on, and a sampler that it lets look."""

    def __init__(self, gpus: int = 2) -> None:
        self.host = FakeHost()
        self.gpus = [FakeGpu(f"GPU-{number}") for number in range(gpus)]
        self._seconds = Seconds()
        reader = Gpus(FakeNvml(*self.gpus), environ={}, clock=self._seconds.now)
        self.sampler = Sampler(reader, self.host, clock=self._seconds.now)

    async def look(self, w: World | None = None, seconds: float = 1.0) -> None:
        """One sample, after so many seconds."""
        self._seconds.advance(seconds)
        self.sampler.sample()
        await settle()
        if w is not None:
            await w.clock.advance(seconds)

    async def ease(self, w: World) -> None:
        self.host.available = EASY
        for gpu in self.gpus:
            gpu.processes.clear()
        await self.look(w)
        await self.look(w, DWELL_S)


@asynccontextmanager
async def pressed(
    slots: int = 2, host: int = 12, **settings: Any
) -> AsyncIterator[tuple[World, Machine]]:
    machine = Machine()
    async with world(slots, host, sampler=machine.sampler, policy="lru", **settings) as w:
        for name in NAMES[: host - 1]:
            await w.ask(name)
        yield w, machine


def held(w: World) -> set[str]:
    return {key.name for key in w.engine._host}


def test_hard_pressure_on_the_host_shrinks_what_is_idle_and_all_is_told() -> None:
    async def main() -> None:
        async with pressed() as (w, machine):
            seen: list[Event] = []
            w.cache.subscribe(seen.append)
            before = w.cache.snapshot()
            machine.host.available = FULL
            await machine.look(w)
            assert held(w) == set(NAMES[6:11]), "in the policy's order, down to half"
            level, budget, *evictions = seen
            assert isinstance(level, PressureEvent)
            assert (level.resource, level.before, level.after) == ("host", Level.NONE, Level.HARD)
            assert isinstance(budget, BudgetEvent)
            assert (budget.before, budget.after) == (None, before.host_bytes // 2)
            assert [e.victim.name for e in evictions if isinstance(e, Eviction)] == NAMES[:6]
            assert "left host memory because memory is scarce: last used" in str(evictions[0])
            assert "the budget of host memory was what is configured, now it is" in str(budget)

            shot = w.cache.snapshot()
            assert shot.memory.levels == {"host": Level.HARD}
            assert shot.memory.host_bytes_now == budget.after
            assert not shot.memory.speculates
            assert shot.memory.events == (budget, level)
            assert "because memory is scarce" in shot.why("n0")

            for _ in range(2):
                await machine.look(w, DWELL_S)
            assert held(w) == w.slots() == {"n9", "n10"}
            stats = w.cache.stats()
            assert stats.given_back == 9
            assert stats.given_back_bytes == before.host_bytes * 9 // 11
            assert stats.host_evictions == 0

    run(main())


def test_it_all_comes_back_when_it_eases() -> None:
    async def main() -> None:
        async with pressed() as (w, machine):
            machine.host.available = FULL
            await machine.look(w)
            machine.host.available = TIGHT
            await machine.look(w)
            await machine.look(w, DWELL_S)
            memory = w.cache.snapshot().memory
            assert memory.levels["host"] is Level.SOFT
            assert memory.host_bytes_now is not None, "it does not grow back yet"
            assert await w.cache.prefetch(ref("n0")) is Tier.DISK
            await machine.ease(w)
            memory = w.cache.snapshot().memory
            assert (memory.host_bytes_now, memory.speculates) == (None, True)
            assert await w.cache.prefetch(ref("n0")) is Tier.HOST
            await w.cache.pin(ref("n0"))
            for name in NAMES:
                await w.ask(name)
            assert len(held(w)) == 12
            budgets = [e for e in memory.events if isinstance(e, BudgetEvent)]
            assert len(budgets) == 2, "once down, once back"

    run(main())


def test_prefetches_stop_at_disk_and_pins_are_refused() -> None:
    async def main() -> None:
        async with pressed() as (w, machine):
            await w.cache.pin(ref("n10"))
            machine.host.available = TIGHT
            await machine.look(w)
            assert await w.cache.prefetch([ref("cold"), ref("n3")]) == {
                str(ref("cold")): Tier.DISK,
                str(ref("n3")): Tier.HOST,
            }
            for tier in ("gpu", "host"):
                with pytest.raises(MemoryPressureError, match="n9@0 cannot be pinned"):
                    await w.cache.pin(ref("n9"), tier=tier)
            await w.cache.pin(ref("n10"))  # exists
            tiers = await w.cache.warm([ref("a"), ref("b")])
            assert set(tiers.values()) == {Tier.GPU, Tier.HOST}, "slots cost no more when full"
            stats = w.cache.stats()
            assert (stats.prefetches_refused, stats.pins_refused) == (1, 2)
            assert stats.given_back == 0

    run(main())


def test_pressure_on_the_engines_gpu_stops_speculation_and_that_on_others_does_not() -> None:
    async def main() -> None:
        async with pressed() as (w, machine):
            other, ours = machine.gpus[1], machine.gpus[0]
            other.processes[1] = 79 * GIB
            await machine.look(w)
            assert await w.cache.prefetch(ref("a")) is Tier.HOST
            ours.processes[1] = 79 * GIB
            await machine.look(w)
            assert w.cache.snapshot().memory.levels["GPU-0"] is Level.SOFT
            assert "GPU-1" not in w.cache.snapshot().memory.levels
            assert await w.cache.prefetch(ref("b")) is Tier.DISK
            with pytest.raises(MemoryPressureError, match="GPU memory"):
                await w.cache.pin(ref("b"))
            assert await w.ask("b") == "b: 0 1 2"
            await machine.ease(w)
            await w.cache.pin(ref("b"))

    run(main())


def test_requests_go_on_through_all_of_it() -> None:
    """Loads take time, leases overlap, pressure comes and goes: nobody fails, nobody is evicted."""

    async def main() -> None:
        engine = {"load_s": 0.3, "activate_s": 0.05, "step_s": 0.2}
        async with world(2, 12, engine=engine, sampler=(m := Machine()).sampler) as w:
            asks = [asyncio.ensure_future(w.ask(name)) for name in NAMES * 8]
            for step in range(120):
                m.host.available = (EASY, FULL, TIGHT, FULL)[step // 7 % 4]
                m.gpus[0].processes[1] = (0, 80 * GIB)[step // 9 % 2]
                await m.look(w, 2.0)
                if step % 5 == 0:
                    await w.cache.prefetch(ref(NAMES[step % 12]), tier="disk")
            answers = await asyncio.gather(*asks)
            assert answers == [f"{name}: 0 1 2" for name in NAMES * 8]
            assert w.cache.stats().given_back > 0
            assert w.cache.stats().load_failures == 0

    run(main())


def test_an_engine_like_stock_gives_back_between_loads() -> None:
    async def main() -> None:
        engine = {"stages_without_slot": False, "max_in_flight": 1, "load_s": 1.0}
        async with world(2, 6, engine=engine, sampler=(m := Machine()).sampler, policy="lru") as w:
            for name in NAMES[:5]:
                ask = asyncio.ensure_future(w.ask(name))
                await w.clock.advance(2.0)
                await ask
            late = asyncio.ensure_future(w.ask("late"))
            await w.clock.advance(0.5)
            m.host.available = FULL
            await m.look()
            assert len(held(w)) == 5, "it is busy"
            await w.clock.advance(5.0)
            await late
            assert len(held(w)) < 5
            assert w.cache.stats().given_back > 0

    run(main())


def test_a_shared_sampler_stays_the_callers_and_says_how_things_stand() -> None:
    async def main() -> None:
        machine = Machine()
        machine.host.available = FULL
        await machine.look()
        for _ in range(2):
            async with world(sampler=machine.sampler) as w:
                assert await w.cache.prefetch(ref("a")) is Tier.DISK
                assert w.cache.snapshot().memory.levels["host"] is Level.HARD
        machine.host.available = EASY
        await machine.look(seconds=1)
        await machine.look(seconds=DWELL_S)
        assert machine.sampler.levels["host"] is Level.NONE

    run(main())


def test_what_comes_after_the_end_disturbs_nobody() -> None:
    async def main() -> None:
        machine = Machine()
        async with world(sampler=machine.sampler) as w:
            machine.host.available = FULL
            machine.sampler.sample()  # posted, not taken yet
        assert w.cache.snapshot().memory.levels["host"] is Level.NONE
        machine.host.available = EASY
        await machine.look()

    run(main())


# ---------------------------------------------------------------------- a sampler of its own


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "lora-cache-memory"]


def test_a_cache_samples_by_itself_and_notices_within_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, gpu = FakeHost(), FakeGpu("GPU-0")
    made: list[Sampler] = []

    def make(config: CacheConfig) -> Sampler:
        reader = Gpus(FakeNvml(gpu), environ={})
        made.append(Sampler(reader, host, period_s=config.memory_period_s, max_share=0.5))
        return made[-1]

    monkeypatch.setattr("lora_cache.cache.make_sampler", make)

    async def main() -> None:
        async with AsyncLoraCache(
            FakeEngine(), sources={"fake": FakeSource()}, publish=False
        ) as cache:
            assert threads() == ["lora-cache-memory"]
            heard: asyncio.Queue[tuple[float, Event]] = asyncio.Queue()
            cache.subscribe(lambda event: heard.put_nowait((time.monotonic(), event)))
            while made[0].latest is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            gpu.processes[1] = 80 * GIB
            began = time.monotonic()
            at, event = await heard.get()
            assert isinstance(event, PressureEvent)
            assert event.resource == "GPU-0"
            assert at - began < 1.0
        assert threads() == []

    run(main())


def test_the_settings() -> None:
    assert make_sampler(CacheConfig(memory_pressure=False)) is None
    marks = Marks(soft=0.5, hard=0.6, band=0.1)
    config = CacheConfig.of({"host_marks": marks, "memory_period_s": 0.1})
    sampler = make_sampler(config)
    assert sampler is not None
    sampler.sample()
    assert "host" in sampler.levels
    sampler.close()
    with pytest.raises(ConfigError, match="must be in order"):
        CacheConfig.of({"host_marks": {"soft": 0.9, "hard": 0.8}})  # type: ignore[typeddict-item]
    with pytest.raises(ConfigError, match="memory_period_s"):
        CacheConfig.of({"memory_period_s": 0})


def test_without_a_driver_nothing_is_said_about_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lora_cache.watch._DRIVERS", ("/nowhere/nvidiactl",))
    sampler = make_sampler(CacheConfig())
    assert sampler is not None
    with caplog.at_level(logging.INFO):
        sampler.sample()
    assert caplog.text == ""


# ---------------------------------------------------------------------- lora-cache status


def test_status_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_STATUS_DIR", str(tmp_path))

    async def main() -> None:
        async with pressed() as (w, machine), StatusFile(w.cache, period_s=0.02):

            async def shown(*options: str) -> str:
                await w.ask("hot")  # something new, so it is written again
                now = w.cache.stats().to_dict()
                while not (found := read_status()) or found[0]["stats"] != now:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                done = await asyncio.to_thread(CliRunner().invoke, app, ["status", *options])
                assert done.exit_code == 0, done.output
                return " ".join(done.stdout.split())

            assert "pressure" not in await shown()
            machine.host.available = FULL
            await machine.look(w)
            await w.cache.prefetch(ref("cold"))
            text = await shown()
            assert "memory pressure: hard on host, host budget down to" in text
            assert "6 copies (6.0 MiB) given back" in text
            assert "refused 1 prefetch and 0 pins" in text
            assert "left host memory because memory is scarce" in text
            (record,) = json.loads(await shown("--json"))
            memory = record["snapshot"]["memory"]
            assert memory["levels"] == {"host": "hard"}
            assert [sorted(event) for event in memory["events"]] == [
                ["after", "at_s", "before"],
                ["after", "at_s", "before", "resource", "share"],
            ]
            assert record["stats"]["prefetches_refused"] == 1
            await machine.ease(w)
            assert "memory pressure: none now; 6 copies (6.0 MiB) given back" in await shown()

    run(main())
