"""`AsyncLoraCache` over the fake engine and a manual clock: what callers see."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from lora_cache import AsyncLoraCache, Tier
from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.errors import (
    AdapterNotFoundError,
    CacheClosedError,
    ConfigError,
    EngineDeadError,
    InvalidAdapterError,
    LeaseTimeoutError,
    LoadFailedError,
    LoraCacheError,
    PinnedError,
    UnsupportedAdapterError,
)
from lora_cache.testing import FakeEngine, FakeSource, ManualClock, RandomPolicy, settle

ref = FakeSource.ref


class World:
    """A cache on fakes, and the handles that tests pull."""

    def __init__(
        self, cache: AsyncLoraCache, engine: FakeEngine, source: FakeSource, clock: ManualClock
    ) -> None:
        self.cache, self.engine, self.source, self.clock = cache, engine, source, clock

    async def ask(self, name: str, **options: Any) -> str:
        last = ""
        async for output in self.cache.generate("?", None, ref(name), **options):
            last = output.text
        return last

    def slots(self) -> set[str]:
        return {key.name for key in self.engine.slots().values()}


@asynccontextmanager
async def world(
    slots: int = 2, host: int = 4, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[World]:
    clock = ManualClock()
    fake = FakeEngine(slots, host, clock=clock, **(engine or {}))
    source = FakeSource()
    settings.setdefault("publish", False)
    async with AsyncLoraCache(fake, sources={"fake": source}, clock=clock, **settings) as cache:
        made = World(cache, fake, source, clock)
        # Resolving takes a worker thread, and threads do not run on the manual clock.
        for name in ("a", "b", "c", "d", "e", "f", "hot", "cold", *(f"n{i}" for i in range(12))):
            await cache.prefetch(ref(name), tier="disk")
        yield made
        assert fake.hidden_loads == 0
        if not fake._dead:
            assert await cache.reconcile() == 0


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_generate_answers_with_the_adapter_and_counts() -> None:
    async def main() -> None:
        async with world() as w:
            assert await w.ask("a") == "a: 0 1 2"
            assert await w.ask("a") == "a: 0 1 2"
            async for output in w.cache.generate("?", None):
                last = output.text
            assert last.startswith("base:")
            stats = w.cache.stats()
            assert (stats.requests, stats.disk_hits, stats.slot_hits) == (2, 1, 1)
            assert stats.slot_hit_ratio == 0.5

    run(main())


def test_concurrent_callers_of_one_adapter_load_it_once() -> None:
    async def main() -> None:
        async with world() as w:
            before = w.source.resolved
            await asyncio.gather(*(w.ask("new") for _ in range(20)))
            assert sum(w.engine.loads.values()) == 1
            assert w.source.resolved == before + 1

    run(main())


def test_a_lease_holds_the_slot_and_its_request() -> None:
    async def main() -> None:
        async with world(slots=1) as w:
            async with w.cache.lease(ref("a")) as lease:
                assert lease.request == lease.key
                assert lease.served_from is Tier.DISK
                waiting = asyncio.ensure_future(w.ask("b"))
                await settle()
                assert not waiting.done()
                assert w.slots() == {"a"}
                snapshot = w.cache.snapshot()
                assert [(row.name, row.leases, row.waiting) for row in snapshot.adapters] == [
                    ("a", 1, 0),
                    ("b", 0, 1),
                ]
            assert await waiting == "b: 0 1 2"
            with pytest.raises(LoraCacheError, match="one block"):
                await lease.__aenter__()

    run(main())


def test_a_timeout_is_one_clear_error_and_leaks_nothing() -> None:
    async def main() -> None:
        async with world(slots=1) as w:
            async with w.cache.lease(ref("a")):
                late = asyncio.ensure_future(w.ask("b", timeout_s=5.0))
                await w.clock.advance(4.9)
                assert not late.done()
                await w.clock.advance(0.2)
                with pytest.raises(LeaseTimeoutError, match=r"1 of 1 slots are leased \(a\)"):
                    await late
                assert isinstance(late.exception(), TimeoutError)
            assert w.cache.snapshot().waiting == 0
            assert await w.ask("b") == "b: 0 1 2"

    run(main())


def test_nobody_waits_longer_than_drain_after_s_and_a_lease() -> None:
    async def main() -> None:
        async with world(slots=1, engine={"step_s": 1.0}, drain_after_s=2.0) as w:
            hot = [asyncio.ensure_future(w.ask("hot"))]
            await settle()
            cold = asyncio.ensure_future(w.ask("cold"))
            for _ in range(8):  # somebody always wants the hot one
                await w.clock.advance(1.0)
                hot.append(asyncio.ensure_future(w.ask("hot")))
                await settle()
            assert cold.done()
            await w.clock.advance(60.0)
            await asyncio.gather(cold, *hot)
            assert w.cache.stats().drains >= 1

    run(main())


class TestEndings:
    def test_closing_the_generator_aborts_and_releases(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"tokens": 1000}) as w:
                async with aclosing(w.cache.generate("?", None, ref("a"))) as stream:
                    await anext(stream)
                assert not w.engine.uses
                assert await w.ask("b") != ""

        run(main())

    def test_a_consumer_that_stops_reading_holds_no_slot(self) -> None:
        async def main() -> None:
            async with world(slots=1) as w:
                stream = w.cache.generate("?", None, ref("a"))
                await anext(stream)
                await settle()
                assert not w.engine.uses
                assert await w.ask("b") == "b: 0 1 2"
                assert [output.text async for output in stream][-1] == "a: 0 1 2"

        run(main())

    def test_a_forgotten_generator_is_aborted(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"tokens": 10_000}) as w:
                stream = w.cache.generate("?", None, ref("a"))
                await anext(stream)
                del stream
                gc.collect()
                await settle()
                assert not w.engine.uses

        run(main())

    def test_cancelling_a_waiter_cancels_only_its_wait(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"load_s": 5.0}) as w:
                first, second = (asyncio.ensure_future(w.ask("a")) for _ in range(2))
                await settle()
                first.cancel()
                await settle()
                await w.clock.advance(6.0)
                assert await second == "a: 0 1 2"
                assert sum(w.engine.loads.values()) == 1

        run(main())

    def test_cancelled_in_the_moment_of_the_grant(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"load_s": 5.0}) as w:
                task = asyncio.ensure_future(w.ask("a"))
                await settle()
                perform = w.cache._driver._perform

                def perform_then_cancel(actions: Any) -> None:
                    perform(actions)  # the grant is set ...
                    task.cancel()  # ... and the caller is cancelled before it can see it

                w.cache._driver._perform = perform_then_cancel  # type: ignore[method-assign]
                await w.clock.advance(6.0)
                w.cache._driver._perform = perform  # type: ignore[method-assign]
                assert task.cancelled()
                assert not w.engine.uses
                other = asyncio.ensure_future(w.ask("b"))
                await w.clock.advance(6.0)
                assert await other == "b: 0 1 2"

        run(main())

    def test_close_aborts_refuses_and_empties_the_engine(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"tokens": 10_000}) as w:
                running = asyncio.ensure_future(w.ask("a"))
                waiting = asyncio.ensure_future(w.ask("b"))
                await settle()
                await w.cache.close()
                for task in (running, waiting):
                    with pytest.raises(CacheClosedError):
                        await task
                with pytest.raises(CacheClosedError):
                    await w.ask("c")
                assert not (await w.engine.holdings()).host
                await w.cache.close()
                async with AsyncLoraCache(w.engine, publish=False):
                    pass
                w.engine._dead = True  # nothing left to reconcile

        run(main())


class TestFailures:
    def test_a_failing_load_is_one_error_and_evicts_nobody(self) -> None:
        async def main() -> None:
            async with world(slots=1, host=1) as w:
                await w.ask("a")
                w.engine.fail_next("b")
                with pytest.raises(LoadFailedError, match="injected"):
                    await w.ask("b")
                assert w.slots() == {"a"}
                with pytest.raises(LoadFailedError):
                    await w.ask("b")
                assert sum(w.engine.loads.values()) == 1  # failed fast, not loaded again
                await w.clock.advance(2.0)
                assert await w.ask("b") == "b: 0 1 2"

        run(main())

    def test_every_caller_gets_its_own_exception(self) -> None:
        async def main() -> None:
            async with world() as w:
                w.engine.fail_next("a")
                errors = await asyncio.gather(w.ask("a"), w.ask("a"), return_exceptions=True)
                assert all(isinstance(error, LoadFailedError) for error in errors)
                assert errors[0] is not errors[1]

        run(main())

    def test_a_rank_above_the_engine_s_is_refused_before_anything_moves(self) -> None:
        async def main() -> None:
            async with world(engine={"max_rank": 16}) as w:
                w.source.add("big", rank=32)
                with pytest.raises(UnsupportedAdapterError, match="max_lora_rank=32"):
                    await w.ask("big")
                assert w.cache.snapshot().adapters == ()

        run(main())

    def test_a_missing_adapter(self) -> None:
        async def main() -> None:
            async with world() as w:
                with pytest.raises(AdapterNotFoundError, match="/no/such/dir"):
                    async with w.cache.lease("/no/such/dir"):
                        pass
                with pytest.raises(AdapterNotFoundError, match="no source named 's3'"):
                    async with w.cache.lease("s3://acme/sql-lora"):
                        pass

        run(main())

    def test_a_dead_engine_is_told_to_everybody(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"load_s": 1.0}) as w:
                tasks = [asyncio.ensure_future(w.ask(name)) for name in "ab"]
                await settle()
                w.engine.die()
                await w.clock.advance(3.0)
                for task in tasks:
                    with pytest.raises(EngineDeadError):
                        await task
                with pytest.raises(EngineDeadError):
                    await w.ask("c")

        run(main())

    def test_new_content_under_an_old_name_is_a_new_adapter(self) -> None:
        async def main() -> None:
            async with world() as w, w.cache.lease(ref("a")) as old:
                w.source.add("a", version=1)
                async with w.cache.lease(ref("a")) as new:
                    assert old.key != new.key
                    assert len(w.engine.slots()) == 2

        run(main())


class TestOperations:
    def test_prefetch_stages_into_host_memory(self) -> None:
        async def main() -> None:
            async with world() as w:
                assert await w.cache.prefetch(ref("a"), tier="disk") is Tier.DISK
                assert await w.cache.prefetch(ref("a")) is Tier.HOST
                assert w.slots() == set()
                async with w.cache.lease(ref("a")) as lease:
                    assert lease.served_from is Tier.HOST

        run(main())

    def test_prefetch_says_when_it_stops_at_disk(self) -> None:
        async def main() -> None:
            async with world(slots=1, engine={"stages_without_slot": False}) as w:
                async with w.cache.lease(ref("a")):
                    assert await w.cache.prefetch(ref("b")) is Tier.DISK
                assert await w.cache.prefetch(ref("b")) is not Tier.DISK

        run(main())

    def test_a_lease_does_not_wait_for_all_that_is_prefetched(self) -> None:
        """Not even one on the last of them: this engine loads in the order in which it is told."""

        async def main() -> None:
            async with world(host=12, engine={"load_s": 1.0, "max_speculative": 2}) as w:
                names = [f"n{number}" for number in range(10)]
                prefetch = asyncio.ensure_future(w.cache.prefetch(list(map(ref, names))))
                await settle()
                waiting = w.cache.snapshot()
                assert (waiting.waiting, waiting.adapters[-1].waiting) == (10, 1)
                asked = [asyncio.ensure_future(w.ask(name)) for name in ("n9", "cold")]
                await w.clock.advance(4.1)
                assert all(each.done() for each in asked)
                assert not prefetch.done()
                await w.clock.advance(10.0)
                assert set((await prefetch).values()) == {Tier.HOST, Tier.GPU}
                assert w.engine.loads.total() == 11

        run(main())

    def test_warm_fetches_several_at_a_time(self) -> None:
        together = threading.Barrier(4)

        class Slow(FakeSource):
            def resolve(self, ref: AdapterRef) -> Adapter:
                together.wait(timeout=10)  # until three others are asked for
                return super().resolve(ref)

        async def main() -> None:
            engine, source = FakeEngine(2, 8), Slow()
            async with AsyncLoraCache(engine, sources={"fake": source}, publish=False) as cache:
                tiers = await cache.warm([ref(f"n{number}") for number in range(8)])
                assert list(tiers.values()) == [Tier.GPU] * 2 + [Tier.HOST] * 6

        run(main())

    def test_warm_puts_the_first_into_slots(self) -> None:
        async def main() -> None:
            async with world(slots=2, host=4) as w:
                tiers = await w.cache.warm([ref(name) for name in "abcdef"])
                assert w.slots() == {"a", "b"}
                assert [tiers[name] for name in "abcdef"] == [
                    *[Tier.GPU] * 2,
                    *[Tier.HOST] * 2,
                    *[Tier.DISK] * 2,
                ]

        run(main())

    def test_warm_takes_one_as_well(self) -> None:
        async def main() -> None:
            async with world(slots=2, host=4) as w:
                assert await w.cache.warm(ref("a")) == {"a": Tier.GPU}
                with pytest.raises(AdapterNotFoundError, match="'nowhere'"):
                    await w.cache.warm("nowhere")  # and not 'n', 'o', 'w', ...
                with pytest.raises(InvalidAdapterError, match="names no adapter"):
                    await w.cache.warm(5)  # type: ignore[arg-type]

        run(main())

    def test_pins(self) -> None:
        async def main() -> None:
            async with world(slots=2) as w:
                await w.cache.pin(ref("a"))
                for name in "bcd":
                    await w.ask(name)
                assert "a" in w.slots()
                with pytest.raises(PinnedError, match="one must stay free"):
                    await w.cache.pin(ref("b"))
                with pytest.raises(PinnedError, match="unpin it"):
                    await w.cache.unload(ref("a"))
                await w.cache.unpin(ref("a"))
                await w.cache.unload(ref("a"))
                assert "a" not in {row.name for row in w.cache.snapshot().adapters}

        run(main())

    def test_unload_drains_first_and_may_time_out(self) -> None:
        async def main() -> None:
            async with world() as w:
                async with w.cache.lease(ref("a")):
                    unload = asyncio.ensure_future(w.cache.unload(ref("a"), timeout_s=1.0))
                    await w.clock.advance(2.0)
                    with pytest.raises(LeaseTimeoutError):
                        await unload
                    async with w.cache.lease(ref("a")) as again:
                        assert again.served_from is Tier.GPU
                    unload = asyncio.ensure_future(w.cache.unload(ref("a")))
                    await settle()
                    assert not unload.done()
                await unload
                assert not (await w.engine.holdings()).host

        run(main())

    def test_reconcile_counts_and_repairs(self) -> None:
        async def main() -> None:
            async with world() as w, w.cache.lease(ref("a")) as lease:
                await w.ask("b")
                w.engine.lose(lease.key)
                w.engine.plant(w.source.add("stranger").key)
                assert await w.cache.reconcile() == 3
                await settle()
                assert "a" in w.slots()
                assert await w.cache.reconcile() == 0

        run(main())


class TestSettings:
    def test_a_wrong_setting_is_named(self) -> None:
        for settings, message in [
            ({"polcy": "lru"}, "unknown setting 'polcy': there are engine, policy"),
            ({"policy": "mru"}, "unknown policy 'mru': choose one of"),
            ({"drain_after_s": -1}, "drain_after_s=-1"),
            ({"host_bytes": "lots"}, "host_bytes='lots'"),
            ({"max_loras": 3}, "started with 2"),
        ]:
            with pytest.raises(ConfigError, match=message):
                AsyncLoraCache(FakeEngine(), **settings)  # type: ignore[arg-type]

    def test_host_bytes_may_be_written_by_people(self) -> None:
        cache = AsyncLoraCache(FakeEngine(), host_bytes="2GiB")
        assert cache.config.host_bytes == 2 << 30

    def test_a_tier_that_is_none(self) -> None:
        async def main() -> None:
            async with world() as w:
                with pytest.raises(ConfigError, match="tier='gpu': choose one of disk, host"):
                    await w.cache.prefetch(ref("a"), tier="gpu")
                with pytest.raises(ConfigError, match="tier='disk': choose one of gpu, host"):
                    await w.cache.pin(ref("a"), tier="disk")

        run(main())

    def test_one_manager_an_engine(self) -> None:
        async def main() -> None:
            async with world() as w:
                with pytest.raises(ConfigError, match="already has a manager"):
                    async with AsyncLoraCache(w.engine):
                        pass

        run(main())

    def test_not_open(self) -> None:
        async def main() -> None:
            with pytest.raises(CacheClosedError, match="async with"):
                async with AsyncLoraCache(FakeEngine()).lease(ref("a")):
                    pass

        run(main())

    def test_what_is_no_engine(self) -> None:
        with pytest.raises(ConfigError, match="not an engine"):
            AsyncLoraCache(object())


@pytest.mark.parametrize("like", ["resident", "stock"])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_keeps_the_engine_s_rules(seed: int, like: str) -> None:
    """Hundreds of requests, prefetches, pins, unloads, failures and cancellations.

    The fake engine asserts that no victim is in use; nothing may drift or leak.
    """

    async def main() -> None:
        rng = random.Random(seed)
        engine = {"load_s": 0.3, "activate_s": 0.05, "step_s": 0.02}
        if like == "stock":
            engine |= {"stages_without_slot": False, "max_in_flight": 1, "max_speculative": 1}
        else:
            engine |= {"max_speculative": 2}
        policy = lambda: RandomPolicy(seed)  # noqa: E731
        async with world(3, 6, engine=engine, policy=policy, drain_after_s=0.5) as w:
            clock = w.clock

            async def one() -> None:
                name = f"n{rng.choices(range(12), [1 / (i + 1) for i in range(12)])[0]}"
                what = rng.random()
                try:
                    if what < 0.7:
                        await w.ask(name, timeout_s=rng.choice([None, 0.5, 5.0]))
                    elif what < 0.8:
                        await w.cache.prefetch(ref(name))
                    elif what < 0.85:
                        await w.cache.pin(ref(name), tier=rng.choice(["gpu", "host"]))
                        await clock.sleep(rng.random())
                        await w.cache.unpin(ref(name))
                    elif what < 0.93:
                        await w.cache.unload(ref(name), timeout_s=2.0)
                    else:
                        w.engine.fail_next(name)
                except (LeaseTimeoutError, LoadFailedError, PinnedError):
                    pass

            tasks = []
            for _ in range(400):
                tasks.append(asyncio.ensure_future(one()))
                if rng.random() < 0.1:
                    rng.choice(tasks).cancel()
                await clock.advance(rng.random() * 0.2)
                driver, planner = w.cache._driver, w.cache._planner
                assert not driver._waiters.keys() & planner._held.keys(), "granted, and not told"
            while not all(task.done() for task in tasks):
                await clock.advance(0.5)
            await clock.advance(5.0)  # loads whose callers gave up: closing waits for them
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert error is None or isinstance(error, asyncio.CancelledError), error
            assert not w.engine.uses
            assert w.cache.snapshot().waiting == 0
            assert w.cache.stats().requests > 100

    run(main())


def test_a_cold_adapter_takes_nobody_s_slot_until_it_is_read() -> None:
    async def main() -> None:
        async with world(1, 4, engine={"load_s": 5.0, "activate_s": 0.5}) as w:
            loading = asyncio.ensure_future(w.ask("hot"))
            await w.clock.advance(6.0)
            await loading
            cold = asyncio.ensure_future(w.ask("cold"))
            await w.clock.advance(4.0)
            assert await asyncio.wait_for(w.ask("hot"), 1) == "hot: 0 1 2"
            assert w.slots() == {"hot"}
            await w.clock.advance(1.5)
            assert await cold == "cold: 0 1 2"
            assert w.slots() == {"cold"}
            assert w.cache.stats().disk_hits == 2

    run(main())


def test_an_engine_that_tells_of_drift_is_repaired_unasked() -> None:
    async def main() -> None:
        async with world() as w:
            async with w.cache.lease(ref("a")) as lease:
                w.engine.lose(lease.key, Tier.GPU)
                w.engine.tell()
                w.engine.tell()
                await w.clock.advance(0.3)
                assert w.cache.stats().drift == 1
                assert w.slots() == {"a"}
            w.engine.tell()  # and closes before it looks

    run(main())
