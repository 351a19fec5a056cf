"""Who stops waiting stops at once, and what has arrived is kept."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.errors import CacheClosedError
from tests.hub.faults import Delay, Stall, too_many_requests
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub
from tests.store.clients import CONFIG, LIST, RESOLVE, WEIGHTS
from tests.store.test_prefetch import cache_on, many, running, started, until

#: Loaded machines are slow; what would have to be waited for takes ten seconds.
PROMPT_S = 1.0

PLACES = pytest.mark.parametrize(
    "place", [RESOLVE, LIST, CONFIG, WEIGHTS], ids=["resolve", "list", "config", "weights"]
)


async def reached(hub: Hub, place: str) -> None:
    await until(lambda: hub.proxy.seen(place))
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("real", [False, True])
def test_a_stalled_body_is_left_at_once(hub: Hub, tmp_path: Path, real: bool) -> None:
    (name,) = many(hub, 1, 40_000)
    hub.proxy.like_the_hub(real)
    hub.proxy.on(Stall(10_000), WEIGHTS)

    async def main() -> None:
        async with cache_on(hub, tmp_path) as cache:
            task = asyncio.ensure_future(cache.prefetch(name))
            await until(lambda: hub.proxy.nbytes(WEIGHTS) >= 10_000)
            await asyncio.sleep(0.05)
            connections = hub.proxy._listeners[real]._connections
            before = len(connections)
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - start < 0.5
            await until(lambda: len(connections) < before)  # the server sees it
            assert time.monotonic() - start < PROMPT_S
            hub.proxy.forget()
            assert await cache.prefetch(name, tier="disk") == "disk"

    asyncio.run(main())
    assert [seen.range for seen in hub.proxy.seen(WEIGHTS)][-1] == "bytes=10000-"
    assert not hub.proxy.seen(CONFIG)


@PLACES
def test_a_server_that_says_nothing_is_left_at_once(hub: Hub, tmp_path: Path, place: str) -> None:
    (name,) = many(hub, 1)
    hub.proxy.on(Delay(5), place)

    async def main() -> float:
        async with cache_on(hub, tmp_path) as cache:
            task = asyncio.ensure_future(cache.prefetch(name))
            await reached(hub, place)
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return start

    start = asyncio.run(main())
    assert time.monotonic() - start < PROMPT_S


@pytest.mark.parametrize("place", [RESOLVE, LIST, WEIGHTS], ids=["resolve", "list", "weights"])
def test_a_pause_is_left_at_once(hub: Hub, tmp_path: Path, place: str) -> None:
    (name,) = many(hub, 1)
    hub.proxy.on(too_many_requests(20), place)

    async def main() -> float:
        async with cache_on(hub, tmp_path) as cache:
            task = asyncio.ensure_future(cache.prefetch(name))
            await reached(hub, place)
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return start

    start = asyncio.run(main())
    assert time.monotonic() - start < PROMPT_S


@PLACES
def test_closing_is_prompt_and_says_so(hub: Hub, tmp_path: Path, place: str) -> None:
    names = many(hub, 3)
    hub.proxy.on(Delay(5), place, times=None)

    async def main() -> float:
        async with cache_on(hub, tmp_path) as cache:
            waiting = [
                asyncio.ensure_future(cache.lease(names[0]).__aenter__()),
                asyncio.ensure_future(cache.prefetch(names[0])),
                asyncio.ensure_future(cache.prefetch(names[1:])),
            ]
            await reached(hub, place)
            start = time.monotonic()
            await cache.close()
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [CacheClosedError] * 3
            await _refuses(cache, names[0])
        return start

    start = asyncio.run(main())
    assert time.monotonic() - start < PROMPT_S


async def _refuses(cache: AsyncLoraCache, name: str) -> None:
    with pytest.raises(CacheClosedError):
        await cache.prefetch(name)


def test_closing_ends_a_stalled_body(hub: Hub, tmp_path: Path) -> None:
    (name,) = many(hub, 1)
    hub.proxy.on(Stall(100), WEIGHTS)

    async def main() -> float:
        async with cache_on(hub, tmp_path) as cache:
            task = asyncio.ensure_future(cache.prefetch(name))
            await until(lambda: hub.proxy.nbytes(WEIGHTS))
            start = time.monotonic()
            await cache.close()
            with pytest.raises(CacheClosedError):
                await task
        return start

    start = asyncio.run(main())
    assert time.monotonic() - start < PROMPT_S


def test_only_the_last_one_to_leave_ends_it(hub: Hub, tmp_path: Path) -> None:
    (name,) = many(hub, 1)
    hub.repos.tag(name, "v1")
    hub.proxy.on(Stall(100), WEIGHTS)

    async def main() -> None:
        async with cache_on(hub, tmp_path, fetch_workers=2) as cache:
            first = asyncio.ensure_future(cache.prefetch(name))
            second = asyncio.ensure_future(cache.prefetch(f"{name}@v1"))
            await until(lambda: hub.proxy.nbytes(WEIGHTS))
            await asyncio.sleep(0.1)
            first.cancel()
            await asyncio.sleep(0.1)
            assert cache._disk._pool._running
            second.cancel()
            await until(lambda: not cache._disk._pool._running, 1)

    asyncio.run(main())
    assert started(hub) == [name]
    assert running(hub) == 1


def test_local_adapters_do_not_wait_for_a_hub_that_says_nothing(hub: Hub, tmp_path: Path) -> None:
    names = many(hub, 1) + [hub.name(f"x{number}") for number in range(40)]
    hub.proxy.on(Delay(5), RESOLVE, times=None)
    for path, content in adapter_files(8_000).items():
        (tmp_path / path).write_bytes(content)

    async def main() -> None:
        async with cache_on(hub, tmp_path) as cache:
            task = asyncio.ensure_future(cache.prefetch(names))
            await reached(hub, RESOLVE)
            start = time.monotonic()
            async with cache.lease(tmp_path):
                assert time.monotonic() - start < PROMPT_S
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
