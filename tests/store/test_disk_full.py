"""No room, no permission: one clear error, and what is there serves on."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lora_cache.adapter import AdapterRef
from lora_cache.catalog import Catalog
from lora_cache.errors import DiskFullError, StoreError
from lora_cache.sources import HubSource, RemoteFile
from lora_cache.store import DiskTier, Store, fetch
from lora_cache.store.origin import Origin
from tests.hub.files import WEIGHTS, adapter_files
from tests.hub.fixtures import Hub
from tests.store.parts import bring, check_idle, content_of, key_of, names_in


def fail(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """Takes some bytes, and then no more."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        self._file.write(piece[:100])
        fail()


def full_weights(path: Path, mode: str = "r") -> Any:
    file = open(path, mode)  # noqa: SIM115
    return FullFile(file) if path.name == WEIGHTS and mode[0] != "r" else file


class FullDatabase(sqlite3.Connection):
    def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
        if statement.startswith("insert"):
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(statement, *args)


def no_mkdir(path: str | Path, *_: Any) -> None:
    if Path(path).parent.name == "partial":
        fail()


def full_index(patch: pytest.MonkeyPatch) -> None:
    real = sqlite3.connect

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return real(*args, factory=FullDatabase, **kwargs)

    patch.setattr(sqlite3, "connect", connect)


WHERE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "weights": lambda patch: patch.setattr(fetch, "open", full_weights, raising=False),
    "fsync": lambda patch: patch.setattr(os, "fsync", fail),
    "origin": lambda patch: patch.setattr(Origin, "write", fail),
    "mkdir": lambda patch: patch.setattr(os, "mkdir", no_mkdir),
    "index": full_index,
}


def resolve(hub: Hub, root: Path, *names: str) -> list[Any]:
    async def run() -> list[Any]:
        disk = DiskTier(root)
        source = HubSource(endpoint=hub.endpoint, cache_dir=hub.cache_dir)
        catalog = Catalog({"hub": source}, disk)
        refs = [AdapterRef.hub(hub.name(name)) for name in names]
        try:
            return await asyncio.gather(*map(catalog.resolve, refs), return_exceptions=True)
        finally:
            await disk.close()

    return asyncio.run(run())


@pytest.mark.parametrize("where", WHERE)
def test_no_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    content = {name: adapter_files(30_000, seed=n) for n, name in enumerate("ab")}
    for name, its in content.items():
        hub.repos.create(hub.name(name), its)
    root = tmp_path / "store"
    (first,) = resolve(hub, root, "a")
    with monkeypatch.context() as patch:
        WHERE[where](patch)
        again, error = resolve(hub, root, "a", "b")
    assert again == first
    assert isinstance(error, DiskFullError)
    assert "lora-cache prune" in str(error)
    assert not list((root / "partial").iterdir())  # the room is given back
    assert names_in(Store(root)) == ["a"]
    (second,) = resolve(hub, root, "b")
    assert content_of(first) == content["a"]
    assert content_of(second) == content["b"]
    check_idle(root)


def test_a_file_system_that_is_full(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "small"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        for number, name in enumerate("abc"):
            hub.repos.create(hub.name(name), adapter_files(400_000, seed=number))
        first, second = (resolve(hub, root, name)[0] for name in "ab")
        assert isinstance(first.key.name, str)
        for _ in range(3):
            again, third = resolve(hub, root, "a", "c")
            assert again == first
            assert isinstance(third, DiskFullError)
        assert second.is_unchanged()
        assert not list((root / "partial").iterdir())
        store = Store(root)
        store.remove(entry.row for entry in store.entries() if entry.row.name == "a")
        (third,) = resolve(hub, root, "c")
        assert content_of(third) == adapter_files(400_000, seed=2)
        check_idle(root)

        # Not one block is left: what is here is found, listed and removed all the same.
        with suppress(OSError), open(root / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        store = Store(root)
        assert store.find(third.key) is not None
        assert names_in(store) == ["b", "c"]
        with pytest.raises(DiskFullError):
            bring(store, "more", 60_000)
        assert len(store.remove(entry.row for entry in store.entries())) == 2
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A store with two adapters, of which this process cannot change anything."""
    root = tmp_path / "store"
    store = Store(root)
    for name in ("a", "b"):
        bring(store, name)
    store.remember(AdapterRef.hub("org/a"), key_of("a"))
    store.close()
    if os.geteuid():
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield root
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        return
    for mount in (["--bind", str(root), str(root)], ["-o", "remount,ro,bind", str(root)]):
        if subprocess.run(["mount", *mount], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def test_a_store_that_cannot_be_written(read_only: Path) -> None:
    store = Store(read_only, max_bytes=1_000_000)
    adapter = store.find(key_of("a"))
    assert adapter is not None
    with store.hold(adapter) or pytest.fail("gone"):
        assert [entry.in_use for entry in store.entries() if entry.row.name == "a"] == [True]
    assert set(names_in(store)) == {"a", "b"}
    assert store.meaning(AdapterRef.hub("org/a")) == key_of("a")
    store.remember(AdapterRef.hub("org/a"), key_of("a"))
    assert [store.verify(entry.row) for entry in store.entries()] == [None, None]
    with pytest.raises(StoreError, match=r"Read-only|Permission|readonly"):
        bring(store, "c")
    with pytest.raises(StoreError):
        store.remove(entry.row for entry in store.entries())
    assert store.find(key_of("c")) is None
    assert len(store.entries()) == 2


def test_a_cache_over_a_store_that_cannot_be_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate("ab"):
        hub.repos.create(hub.name(name), adapter_files(30_000, seed=number))
    root = tmp_path / "store"
    (first,) = resolve(hub, root, "a")

    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    class ReadOnly(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
            if statement == "begin immediate":
                raise sqlite3.OperationalError("attempt to write a readonly database")
            return super().execute(statement, *args)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, factory=ReadOnly, **k))
    for name in ("rename", "replace", "utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    again, error = resolve(hub, root, "a", "b")
    assert again == first
    assert isinstance(error, StoreError)
    assert not isinstance(error, DiskFullError)


def test_remote_files_are_what_was_promised(tmp_path: Path) -> None:
    adapter = bring(Store(tmp_path), "a")
    origin = Origin.read(adapter.path)
    assert all(isinstance(file, RemoteFile) for file in origin.remote_files)
    assert origin.nbytes == sum(map(len, content_of(adapter).values()))
