"""The catalog: one resolution a ref at a time, shared by all who wait for it."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.catalog import Catalog
from lora_cache.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    LoraCacheError,
    SourceError,
    UnsupportedAdapterError,
)
from lora_cache.manifest import Manifest
from lora_cache.sources import LocalSource
from lora_cache.store import DiskTier
from lora_cache.store.pool import Urgency
from tests.real.parts import write_adapter

ANY = AdapterKey("slow:any")
FACTS = Manifest(4, 8.0, 2.0, ("q_proj",), (), ("BF16",), None, 1 << 20, 4)


def ref(name: str) -> AdapterRef:
    return AdapterRef("slow", name)


class SlowSource:
    """Resolves when `gate` is open, in whatever thread it is called; counts what it is asked."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls: Counter[str] = Counter()
        self.threads: set[int] = set()
        self.errors: dict[str, Exception] = {}
        self.outdated: set[str] = set()
        self._asked: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self._lock = threading.Lock()

    def resolve(self, ref: AdapterRef) -> Adapter:
        with self._lock:
            self.calls[ref.location] += 1
            self.threads.add(threading.get_ident())
            version = self.calls[ref.location]
            self._asked[ref.location].set()
        assert self.gate.wait(10), "the test never opened the gate"
        if error := self.errors.get(ref.location):
            raise error
        key = AdapterKey(f"slow:{ref.location}:{version}", ref.location)
        return Adapter(key, Path("/nonexistent") / ref.location, FACTS)

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        return ref.location not in self.outdated

    async def asked_for(self, name: str) -> None:
        """Wait until a resolution of `name` has begun."""
        assert await asyncio.to_thread(self._asked[name].wait, 10)


@pytest.fixture
def source() -> SlowSource:
    return SlowSource()


@pytest.fixture
def catalog(source: SlowSource) -> Catalog:
    return Catalog({"slow": source, "local": LocalSource()}, DiskTier())


async def outcomes(*waits: asyncio.Future[Adapter]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 10)


# ---------------------------------------------------------------------------- sharing


def test_callers_of_one_ref_share_one_resolution(source: SlowSource, catalog: Catalog) -> None:
    async def main() -> None:
        waits = [asyncio.ensure_future(catalog.resolve(ref("a"))) for _ in range(20)]
        await source.asked_for("a")
        await asyncio.sleep(0.02)
        source.gate.set()
        found = await outcomes(*waits)
        assert all(adapter is found[0] for adapter in found)
        assert isinstance(found[0], Adapter)

    asyncio.run(main())
    assert source.calls == {"a": 1}
    assert threading.get_ident() not in source.threads, "the event loop is never blocked"


def test_other_refs_are_resolved_side_by_side(source: SlowSource, catalog: Catalog) -> None:
    async def main() -> None:
        waits = [asyncio.ensure_future(catalog.resolve(ref(name))) for name in "ab"]
        await source.asked_for("a")
        await source.asked_for("b")  # while the first one is still held up
        source.gate.set()
        one, two = await outcomes(*waits)
        assert one.key != two.key

    asyncio.run(main())


def test_a_lease_does_not_queue_behind_many_prefetches(
    source: SlowSource, catalog: Catalog
) -> None:
    async def main() -> None:
        waits = [
            asyncio.ensure_future(catalog.resolve(ref(str(n)), urgency=Urgency.SPECULATION))
            for n in range(100)
        ]
        await source.asked_for("0")
        lease = asyncio.ensure_future(catalog.resolve(ref("new")))
        await source.asked_for("new")  # while nobody else gets an answer
        joined = asyncio.ensure_future(catalog.resolve(ref("99")))  # one that waits for its turn
        source.gate.set()
        await outcomes(lease, joined)
        assert not all(wait.done() for wait in waits)
        await outcomes(*waits)

    asyncio.run(main())


def test_a_known_ref_is_not_read_again_until_it_is_outdated(
    source: SlowSource, catalog: Catalog
) -> None:
    async def main() -> None:
        source.gate.set()
        first = await catalog.resolve(ref("a"))
        assert await catalog.resolve(ref("a")) is first
        assert catalog.current(ref("a")) is first
        assert source.calls["a"] == 1
        source.outdated.add("a")
        assert catalog.current(ref("a")) is None
        assert catalog.last(ref("a")) is first
        second = await catalog.resolve(ref("a"))
        assert second.key != first.key
        assert source.calls["a"] == 2
        assert catalog[first.key] is first, "what may still be loaded keeps its files' place"
        assert catalog[second.key] is second

    asyncio.run(main())


def test_a_cancelled_caller_takes_nothing_from_the_others(
    source: SlowSource, catalog: Catalog
) -> None:
    async def main() -> None:
        first, second = (asyncio.ensure_future(catalog.resolve(ref("a"))) for _ in range(2))
        await source.asked_for("a")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        third = asyncio.ensure_future(catalog.resolve(ref("a")))
        await asyncio.sleep(0)
        source.gate.set()
        one, two = await outcomes(second, third)
        assert isinstance(one, Adapter)
        assert one is two

    asyncio.run(main())
    assert source.calls == {"a": 1}


def test_a_resolution_that_everybody_left_is_given_up(source: SlowSource, catalog: Catalog) -> None:
    async def main() -> None:
        wait = asyncio.ensure_future(catalog.resolve(ref("a")))
        await source.asked_for("a")
        wait.cancel()
        await asyncio.gather(wait, return_exceptions=True)
        again = asyncio.ensure_future(catalog.resolve(ref("a")))
        source.gate.set()
        assert await again is catalog.last(ref("a"))

    asyncio.run(main())
    assert source.calls == {"a": 2}


# ---------------------------------------------------------------------------- errors


def test_a_source_with_a_defect_is_one_error_of_ours(source: SlowSource, catalog: Catalog) -> None:
    source.errors["a"] = RuntimeError("a defect")
    source.gate.set()
    with pytest.raises(SourceError, match="the source 'slow' failed: a defect") as caught:
        asyncio.run(catalog.resolve(ref("a")))
    assert caught.value.__cause__ is source.errors["a"]


@pytest.mark.parametrize("error", [InvalidAdapterError("damaged"), LoraCacheError("unknown")])
def test_an_error_reaches_every_caller_and_is_not_remembered(
    source: SlowSource, catalog: Catalog, error: Exception
) -> None:
    async def main() -> None:
        source.errors["a"] = error
        waits = [asyncio.ensure_future(catalog.resolve(ref("a"))) for _ in range(3)]
        await source.asked_for("a")
        source.gate.set()
        assert await outcomes(*waits) == [error] * 3
        assert len(catalog) == 0
        assert catalog.current(ref("a")) is catalog.last(ref("a")) is None
        del source.errors["a"]
        assert isinstance(await catalog.resolve(ref("a")), Adapter)

    asyncio.run(main())
    assert source.calls == {"a": 2}


def test_an_error_that_everybody_left_makes_no_noise(source: SlowSource, catalog: Catalog) -> None:
    async def main() -> list[Any]:
        noise: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: noise.append(what))
        source.errors["a"] = InvalidAdapterError("damaged")
        wait = asyncio.ensure_future(catalog.resolve(ref("a")))
        await source.asked_for("a")
        wait.cancel()
        await asyncio.gather(wait, return_exceptions=True)
        del wait
        source.gate.set()
        await asyncio.sleep(0.05)
        del source.errors["a"]
        await catalog.resolve(ref("a"))
        gc.collect()
        return noise

    assert asyncio.run(main()) == []
    assert source.calls == {"a": 2}


def test_an_outdated_adapter_survives_a_failing_new_resolution(
    source: SlowSource, catalog: Catalog
) -> None:
    async def main() -> None:
        source.gate.set()
        first = await catalog.resolve(ref("a"))
        source.outdated.add("a")
        source.errors["a"] = AdapterNotFoundError("gone")
        with pytest.raises(AdapterNotFoundError, match="gone"):
            await catalog.resolve(ref("a"))
        assert catalog.last(ref("a")) is first
        assert catalog[first.key] is first

    asyncio.run(main())


def test_an_unknown_source_is_not_found_and_the_known_ones_are_named(catalog: Catalog) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"'hub' .*there is: local, slow"):
        asyncio.run(catalog.resolve(AdapterRef.hub("org/name")))
    assert catalog.current(AdapterRef.hub("org/name")) is None


def test_what_is_not_accepted_is_not_in_the_catalog(source: SlowSource) -> None:
    asked: list[Adapter] = []

    def accept(adapter: Adapter) -> None:
        asked.append(adapter)
        raise UnsupportedAdapterError("its rank is too large")

    catalog = Catalog({"slow": source}, DiskTier(), accept)

    async def main() -> None:
        source.gate.set()
        for _ in range(2):
            with pytest.raises(UnsupportedAdapterError, match="rank"):
                await catalog.resolve(ref("a"))

    asyncio.run(main())
    assert len(asked) == 2, "it is asked anew: the files may have been mended"
    assert len(catalog) == 0
    assert catalog.get(asked[0].key) is None
    assert catalog.last(ref("a")) is None


def test_a_key_that_nobody_named_is_unknown(catalog: Catalog) -> None:
    assert catalog.get(ANY) is None
    with pytest.raises(KeyError):
        catalog[ANY]


# ---------------------------------------------------------------------------- same content


def test_the_same_content_under_two_refs_is_read_from_the_first_path(
    catalog: Catalog, tmp_path: Path
) -> None:
    one = write_adapter(tmp_path / "one", seed=1)
    two = write_adapter(tmp_path / "two", seed=1)

    async def main() -> None:
        first = await catalog.resolve(AdapterRef.local(one))
        second = await catalog.resolve(AdapterRef.local(two))
        assert first.key == second.key
        assert len(catalog) == 2
        assert catalog[second.key].path == one.resolve()
        assert catalog.last(AdapterRef.local(two)) is second

    asyncio.run(main())


GOINGS: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "rewritten": lambda path: write_adapter(path, seed=2, rank=8),
}


@pytest.mark.parametrize("going", GOINGS)
def test_the_first_path_is_given_up_when_its_content_is_gone(
    catalog: Catalog, tmp_path: Path, going: str
) -> None:
    one = write_adapter(tmp_path / "one", seed=1)
    two = write_adapter(tmp_path / "two", seed=1)

    async def main() -> None:
        first = await catalog.resolve(AdapterRef.local(one))
        GOINGS[going](one)
        second = await catalog.resolve(AdapterRef.local(two))
        assert second.key == first.key
        assert catalog[first.key].path == two.resolve()
        assert catalog.get(first.key) is second

    asyncio.run(main())


def test_any_error_of_accept_keeps_what_was_known_before(source: SlowSource) -> None:
    refusing = False

    def accept(adapter: Adapter) -> None:
        if refusing:
            raise LoraCacheError("no more")

    catalog = Catalog({"slow": source}, DiskTier(), accept)

    async def main() -> None:
        nonlocal refusing
        source.gate.set()
        first = await catalog.resolve(ref("a"))
        refusing = True
        source.outdated.add("a")
        with pytest.raises(LoraCacheError, match="no more"):
            await catalog.resolve(ref("a"))
        assert catalog.last(ref("a")) is first
        assert catalog.get(replace(first.key, digest="slow:a:2")) is None

    asyncio.run(main())
