"""One store, several processes: nothing is fetched twice, nothing that is held goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache
from lora_cache.adapter import Adapter
from lora_cache.errors import DiskFullError
from lora_cache.policies import LRU
from lora_cache.sources import HubSource
from lora_cache.store import Store
from lora_cache.store import store as store_module
from lora_cache.store.locks import try_hold, wait_to_hold
from lora_cache.testing import FakeEngine
from tests.hub.files import WEIGHTS, adapter_files
from tests.hub.fixtures import Hub
from tests.store.parts import (
    bring,
    check_agreement,
    check_idle,
    content_of,
    files_named,
    key_of,
    names_in,
)
from tests.store.puller import event, finish, pull_from, start

NBYTES = sum(map(len, files_named("a0").values()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("count", [2, 4])
def test_each_adapter_is_fetched_once(hub: Hub, root: Path, count: int) -> None:
    files = {f"a{n}": adapter_files(20_000, seed=n) for n in range(20)}
    for name, content in files.items():
        hub.repos.create(hub.name(name), content)
    names = list(files)
    finish(*(pull_from(hub, root, names[n:] + names[:n]) for n in range(0, 5 * count, 5)))
    assert len(hub.proxy.seen(WEIGHTS, "GET")) == len(files)
    check_idle(root)
    for path in (root / "adapters").iterdir():
        assert content_of(path) == files[path.name.rpartition("-")[0]]


def give_up(root: Path, rounds: int) -> None:
    """Begin fetches of one adapter, and leave nothing behind each time."""
    store_module._POLL_S = 0
    store = Store(root)
    for _ in range(rounds):
        with store.partial(key_of("a0"), lambda: None) as partial:
            assert partial is not None
            (partial / "mine").touch(exist_ok=False)  # nobody else is in it
            (partial / "mine").unlink()
    store.close()


def test_fetches_that_leave_nothing_do_not_stumble_over_each_other(root: Path) -> None:
    finish(*(start(give_up, root, 500) for _ in range(3)))
    assert list((root / "partial").iterdir()) == []


# ------------------------------------------------------------------ holds


def remover(root: Path, gone: Any) -> None:
    store = Store(root)
    if store.remove(entry.row for entry in store.entries()):
        gone.set()
    store.close()


def removed_elsewhere(root: Path) -> bool:
    gone = event()
    finish(start(remover, root, gone))
    return bool(gone.is_set())


@pytest.mark.long
def test_what_is_held_stays(root: Path) -> None:
    store = Store(root)
    adapter = bring(store, "a0")
    first, second = store.hold(adapter), store.hold(adapter)
    assert first is not None
    assert second is not None
    first.release()
    assert not removed_elsewhere(root)
    assert store.entries()[0].in_use
    second.release()
    assert not store.entries()[0].in_use
    assert removed_elsewhere(root)
    assert store.hold(adapter) is None
    assert store.find(key_of("a0")) is None
    assert store.hold(Adapter(adapter.key, Path("/elsewhere"), adapter.manifest, ())) is not None


def test_what_is_loaded_stays(hub: Hub, root: Path) -> None:
    hub.repos.create(hub.name("a"), adapter_files(10_000))
    hub.repos.create(hub.name("b"), adapter_files(10_000, seed=2))
    nbytes = sum(map(len, adapter_files(10_000).values()))

    async def run() -> None:
        sources = {"hub": HubSource(endpoint=hub.endpoint, cache_dir=hub.cache_dir)}
        cache = AsyncLoraCache(
            FakeEngine(slots=1, host_entries=1),
            sources=sources,  # type: ignore[arg-type]
            disk_dir=root,
            disk_bytes=nbytes + 100,
            publish=False,
        )
        async with cache:
            async with cache.lease(hub.name("a")) as lease:
                assert not await asyncio.to_thread(removed_elsewhere, root)
                with pytest.raises(DiskFullError, match="disk_bytes"):
                    async with cache.lease(hub.name("b")):
                        pass
                async with cache.lease(hub.name("a")) as again:
                    assert again.key == lease.key
            await cache.unload(hub.name("a"))
            async with cache.lease(hub.name("b")):
                assert names_in(cache._disk.store) == ["b"]

    asyncio.run(run())
    assert removed_elsewhere(root)


def lister(root: Path, begun: Any, stop: Any) -> None:
    store = Store(root)
    while not stop.is_set():
        store.entries()
        begun.set()


@pytest.mark.long
def test_looking_does_not_get_in_the_way(root: Path) -> None:
    store = Store(root)
    adapter = bring(store, "a0")
    begun, stop = event(), event()
    process = start(lister, root, begun, stop)
    assert begun.wait(30)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        hold = store.hold(adapter)
        assert hold is not None
        hold.release()
        assert store.find(adapter.key) is not None
    stop.set()
    finish(process)


def test_a_forked_child_keeps_no_lock(tmp_path: Path) -> None:
    hold = try_hold(tmp_path, exclusive=True)
    assert hold is not None
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        assert try_hold(tmp_path, exclusive=False) is None
        hold.release()
        assert try_hold(tmp_path, exclusive=True) is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_who_comes_late_finds_it_published(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking for the adapter and making the directory, another process is done."""
    store, other = Store(root), Store(root)
    real = os.mkdir

    def slow(path: str | Path, *args: Any) -> None:
        if Path(path).parent.name == "partial":
            monkeypatch.undo()
            bring(other, "a0")
        real(path, *args)

    store.entries()
    bring(store, "other")
    monkeypatch.setattr(os, "mkdir", slow)
    with store.partial(key_of("a0"), lambda: None) as partial:
        assert partial is None
    check_idle(root)


# ------------------------------------------------------------------ the budget


def filler(root: Path, names: list[str], max_bytes: int) -> None:
    store = Store(root, max_bytes=max_bytes)
    for name in names:
        bring(store, name, between=lambda _: time.sleep(0.002))
    store.close()


def test_the_budget_holds_at_any_time(root: Path) -> None:
    budget = 8 * NBYTES
    Store(root).entries()
    bring(watched := Store(root), "first")
    reserved, there, stop = [], [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            reserved.append(sum(row.nbytes for row in watched._index.rows()))
            with wait_to_hold(root):  # now nothing comes or goes, it only grows
                files = [*root.glob("adapters/*/adapter_*"), *root.glob("partial/*/adapter_*")]
                there.append(sum(path.stat().st_size for path in files))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lists = [[f"{letter}{n}" for n in range(40)] for letter in "ab"]
    try:
        finish(*(start(filler, root, names, budget) for names in (*lists, lists[0][::-1])))
    finally:
        stop.set()
        watcher.join()
    assert len(reserved) > 100
    assert budget - NBYTES < max(reserved) <= budget
    assert max(there) <= budget
    check_idle(root)


class MRU(LRU):
    """A policy of one's own: the last used goes first."""

    def rank_victims(self, now: float) -> Iterator[Any]:
        yield from reversed(list(super().rank_victims(now)))


@pytest.mark.parametrize(
    ("policy", "left"),
    [("lru", {"a1", "a0", "new"}), ("lfu", {"a2", "a0", "new"}), (MRU, {"a1", "a2", "new"})],
)
def test_victims_are_the_policys(root: Path, policy: Any, left: set[str]) -> None:
    store = Store(root, max_bytes=3 * NBYTES + 100, policy=policy)
    for name in ("a0", "a1", "a2"):
        bring(store, name)
    for name in ("a2", "a2", "a2", "a1", "a0", "a0"):
        assert store.find(key_of(name)) is not None
        time.sleep(0.01)
    bring(store, "new", nbytes=4_000)
    assert set(names_in(store)) == left


def test_a_fetch_that_broke_off_goes_first(root: Path) -> None:
    store = Store(root, max_bytes=3 * NBYTES)

    def break_off(partial: Path) -> None:
        (partial / WEIGHTS).write_bytes(b"x")
        raise KeyError

    bring(store, "a0")
    with pytest.raises(KeyError):
        bring(store, "b0", between=break_off)
    bring(store, "a1")
    assert len(store.entries()) == 3
    bring(store, "a2")
    assert set(names_in(store)) == {"a0", "a1", "a2"}
    check_idle(root)


def test_what_is_held_is_passed_over_and_nobody_goes_in_vain(root: Path) -> None:
    store = Store(root, max_bytes=3 * NBYTES)
    held = [store.hold(bring(store, name)) for name in ("a0", "a1")]
    bring(store, "a2")
    bring(store, "a3")
    assert names_in(store) == ["a0", "a1", "a3"]
    for name, nbytes in (("big", 12_000), ("bigger", 10**6)):
        with pytest.raises(DiskFullError, match="disk_bytes"):
            bring(store, name, nbytes)
        assert names_in(store) == ["a0", "a1", "a3"]
    check_idle(root)
    assert all(held)


def test_what_was_held_until_now_was_used_until_now(root: Path) -> None:
    store = Store(root, max_bytes=2 * NBYTES)
    hold = store.hold(bring(store, "a0"))
    bring(store, "a1")
    time.sleep(0.01)
    assert hold is not None
    hold.release()
    bring(store, "a2")
    assert names_in(store) == ["a0", "a2"]


def test_a_stale_list_takes_nothing_away(root: Path) -> None:
    store = Store(root)

    def look(_: Path) -> None:
        rows.extend(entry.row for entry in Store(root).entries())

    rows: list[Any] = []
    adapter = bring(store, "a0", between=look)
    assert rows[0].partial
    assert store.remove(rows) == []
    assert store.find(adapter.key) is not None
    check_agreement(root)
