"""Many fetches at a time: who goes first, how fast, and who shares with whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AdapterRef, AsyncLoraCache, Tier
from lora_cache.errors import AdapterNotFoundError, LeaseTimeoutError
from lora_cache.sources import HubSource
from lora_cache.store import Progress
from lora_cache.testing import FakeEngine
from tests.hub.faults import Cut, Flip, Slow, Stall
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub
from tests.store.clients import WEIGHTS


@asynccontextmanager
async def cache_on(
    hub: Hub, directory: Path, source: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[AsyncLoraCache]:
    made = HubSource(endpoint=hub.endpoint, cache_dir=hub.cache_dir, token=False, **(source or {}))
    cache = AsyncLoraCache(
        FakeEngine(2, 16),
        sources={"hub": made},
        disk_dir=directory / "store",
        publish=False,
        **settings,
    )
    async with cache:
        yield cache


def many(hub: Hub, count: int, nbytes: int = 8_000) -> list[str]:
    """Repositories, each with an adapter; all names of them."""
    names = [hub.name(f"n{number}") for number in range(count)]
    for number, name in enumerate(names):
        hub.repos.create(name, adapter_files(nbytes, seed=number))
    return names


async def until(true: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  another thread makes it true
            await asyncio.sleep(0.005)


def started(hub: Hub) -> list[str]:
    """The repositories whose weights were asked for, in that order."""
    return [seen.target.partition("/resolve/")[0][1:] for seen in hub.proxy.seen(WEIGHTS)]


def running(hub: Hub) -> int:
    return sum(not seen.complete for seen in hub.proxy.seen(WEIGHTS))


@pytest.mark.parametrize(("workers", "concurrent", "most"), [(4, 8, 3), (8, 2, 2), (1, 8, 1)])
def test_so_many_at_a_time(
    hub: Hub, tmp_path: Path, workers: int, concurrent: int, most: int
) -> None:
    """Of `fetch_workers`, one is kept for leases."""
    names = many(hub, 6)
    hub.proxy.on(Slow(60_000), WEIGHTS, times=None)
    seen = 0

    async def main() -> None:
        nonlocal seen
        async with cache_on(
            hub, tmp_path, {"max_concurrent": concurrent}, fetch_workers=workers
        ) as cache:
            task = asyncio.ensure_future(cache.prefetch(names, tier="disk"))
            while not task.done():
                seen = max(seen, running(hub))
                await asyncio.sleep(0.005)
            assert await task == dict.fromkeys(names, Tier.DISK)

    asyncio.run(main())
    assert seen == most


@pytest.mark.parametrize("queued_already", [False, True])
def test_a_lease_overtakes_speculation(hub: Hub, tmp_path: Path, queued_already: bool) -> None:
    names = many(hub, 8)
    hub.proxy.on(Stall(100), f"{names[0]}/.*{WEIGHTS}", times=None)

    async def main() -> None:
        async with cache_on(hub, tmp_path, fetch_workers=2) as cache:
            first = asyncio.ensure_future(cache.prefetch(names[0], tier="disk"))
            await until(lambda: started(hub))
            others = names[1:] if queued_already else names[1:-1]
            task = asyncio.ensure_future(cache.prefetch(others, tier="disk"))
            queue = cache._disk._pool._queue
            await until(lambda: len(queue) == len(others))
            assert started(hub) == [names[0]]  # the other worker is for leases
            async with asyncio.timeout(5), cache.lease(names[-1]):
                pass
            assert started(hub) == [names[0], names[-1]]
            assert len(queue) == 6
            first.cancel()
            task.cancel()
            await asyncio.gather(first, task, return_exceptions=True)

    asyncio.run(main())


def test_a_lease_is_next_when_all_are_busy(hub: Hub, tmp_path: Path) -> None:
    names = many(hub, 5)
    hub.proxy.on(Stall(100), f"{names[0]}/.*{WEIGHTS}", times=None)

    async def main() -> None:
        async with cache_on(hub, tmp_path, fetch_workers=1) as cache:
            first = asyncio.ensure_future(cache.prefetch(names[0], tier="disk"))
            await until(lambda: started(hub))
            others = asyncio.ensure_future(cache.prefetch(names[1:-1], tier="disk"))
            queue = cache._disk._pool._queue
            await until(lambda: len(queue) == 3)
            lease = asyncio.ensure_future(cache.lease(names[-1]).__aenter__())
            await until(lambda: len(queue) == 4)
            first.cancel()
            await asyncio.gather(lease, others)

    asyncio.run(main())
    assert started(hub)[:2] == [names[0], names[-1]]


def test_a_lease_that_joins_a_running_speculation_frees_its_place(hub: Hub, tmp_path: Path) -> None:
    names = many(hub, 3)
    hub.proxy.on(Stall(100), f"{names[0]}/.*{WEIGHTS}", times=None)

    async def main() -> None:
        async with cache_on(hub, tmp_path, fetch_workers=2) as cache:
            task = asyncio.ensure_future(cache.prefetch(names, tier="disk"))
            await until(lambda: started(hub))
            lease = asyncio.ensure_future(cache.lease(names[0]).__aenter__())
            await until(lambda: len(started(hub)) == 3)
            task.cancel()
            lease.cancel()
            await asyncio.gather(task, lease, return_exceptions=True)

    asyncio.run(main())


def test_bytes_per_second(hub: Hub, tmp_path: Path) -> None:
    names = many(hub, 3, 100_000)

    async def main() -> None:
        async with cache_on(hub, tmp_path, {"bytes_per_s": 300_000}) as cache:
            start = time.monotonic()
            await cache.prefetch(names, tier="disk")
            assert 0.6 < time.monotonic() - start < 4

    asyncio.run(main())


def test_progress_is_monotonic_and_ends_at_the_total(hub: Hub, tmp_path: Path) -> None:
    files = adapter_files(300_000)
    hub.repos.create(hub.name("sql"), files)
    total = sum(map(len, files.values()))
    hub.proxy.on(Cut(5), WEIGHTS)
    hub.proxy.on(Flip(1), WEIGHTS, skip=1)
    seen: list[Progress] = []

    async def main() -> None:
        async with cache_on(hub, tmp_path) as cache:
            await cache.prefetch(hub.name("sql"), tier="disk", progress=seen.append)

    asyncio.run(main())
    assert all(entry.ref == AdapterRef.hub(hub.name("sql")) for entry in seen)
    done = [entry.done for entry in seen]
    assert done == sorted(set(done))
    assert len(done) > 2
    assert {entry.total for entry in seen} == {total}
    assert done[-1] == total


def test_two_callers_share_one_download(hub: Hub, tmp_path: Path) -> None:
    (name,) = many(hub, 1)
    hub.repos.tag(name, "v1")
    hub.proxy.on(Slow(50_000), WEIGHTS, times=None)

    async def main() -> None:
        async with cache_on(hub, tmp_path) as cache:
            first = asyncio.ensure_future(cache.prefetch(name))
            second = asyncio.ensure_future(cache.prefetch(name))
            third = asyncio.ensure_future(cache.lease(f"{name}@v1").__aenter__())
            await until(lambda: started(hub))
            first.cancel()
            lease = await third
            assert await second in (Tier.HOST, Tier.GPU)
            lease.end()
            assert first.cancelled()

    asyncio.run(main())
    assert started(hub) == [name]


def test_one_bad_name_does_not_stop_the_others(hub: Hub, tmp_path: Path) -> None:
    names = many(hub, 3)

    async def main() -> None:
        async with cache_on(hub, tmp_path) as cache:
            with pytest.raises(AdapterNotFoundError, match="missing"):
                await cache.prefetch([names[0], hub.name("missing"), *names[1:]])
            assert sorted(started(hub)) == names
            hub.proxy.forget()
            assert await cache.prefetch(names) == dict.fromkeys(names, Tier.HOST)
            assert not started(hub)

    asyncio.run(main())


def test_a_lease_waits_for_so_long(hub: Hub, tmp_path: Path) -> None:
    (name,) = many(hub, 1)
    hub.proxy.on(Stall(100), WEIGHTS)

    async def main() -> None:
        async with cache_on(hub, tmp_path) as cache:
            start = time.monotonic()
            with pytest.raises(LeaseTimeoutError, match="prefetch"):
                async with cache.lease(name, timeout_s=0.5):
                    pass
            assert time.monotonic() - start < 1.5
            async with cache.lease(name, timeout_s=5):
                pass

    asyncio.run(main())
