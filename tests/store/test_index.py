"""The index can be lost, damaged, foreign or locked; the files are the truth."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.errors import InvalidAdapterError, StoreError
from lora_cache.store import Store
from lora_cache.store.origin import ORIGIN_FILE
from tests.hub.files import CONFIG, WEIGHTS
from tests.store.parts import bring, check_agreement, check_idle, files_named, key_of, names_in

NAMES = ["a0", "a1", "a2"]


def overwrite_middle(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(os.urandom(path.stat().st_size // 3))


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("x")


def drop_table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("drop table adapters")


def other_columns(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("alter table adapters rename column used to seen")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage" * 999),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "odd": lambda path: os.truncate(path, 777),
    "overwritten": overwrite_middle,
    "directory": make_directory,
    "no table": drop_table,
    "other columns": other_columns,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for name in NAMES:
        bring(store, name)
    time.sleep(0.01)
    assert store.find(key_of("a0")) is not None
    return store


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
def test_it_is_made_anew(store: Store, damage: str, is_open: bool) -> None:
    if not is_open:
        store.close()
    DAMAGES[damage](store.root / "index.sqlite")
    bring(store, "a3")
    assert names_in(store) == ["a1", "a2", "a0", "a3"]  # the files know the order
    check_agreement(store.root)
    if damage == "directory":
        assert list(store.root.glob("index.sqlite.not-ours-*/mine"))


@pytest.mark.parametrize("version", [2, -1])
def test_another_versions_index_is_refused_not_destroyed(store: Store, version: int) -> None:
    store.close()
    with sqlite3.connect(store.root / "index.sqlite") as database:
        database.execute(f"pragma user_version = {version}")
    before = (store.root / "index.sqlite").read_bytes()
    with pytest.raises(StoreError, match="another version"):
        bring(store, "new")
    assert store.meaning(AdapterRef.hub("org/a0")) is None
    assert store.find(key_of("a0")) is not None
    assert set(names_in(store)) == set(NAMES)
    assert (store.root / "index.sqlite").read_bytes() == before


def test_it_waits_for_who_has_it(store: Store) -> None:
    other = sqlite3.connect(store.root / "index.sqlite", check_same_thread=False)
    other.execute("begin exclusive")
    threading.Timer(0.5, other.rollback).start()
    began = time.monotonic()
    bring(store, "a3")
    assert time.monotonic() - began > 0.3
    assert names_in(store)[-1] == "a3"


def test_one_that_stays_locked_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cache.store.index._BUSY_S", 0.05)
    store.close()
    other = sqlite3.connect(store.root / "index.sqlite")
    other.execute("begin exclusive")
    with pytest.raises(StoreError, match="locked"):
        bring(store, "a3")
    assert store.find(key_of("a0")) is not None
    other.rollback()
    other.close()
    bring(store, "a3")
    check_idle(store.root)


def test_what_is_reserved_survives_it(store: Store) -> None:
    size = store.entries()[0].row.nbytes

    def lose_it(_: Path) -> None:
        (store.root / "index.sqlite").unlink()
        rows = {entry.row.name: entry.row for entry in Store(store.root).entries()}
        assert rows["new"].partial
        assert rows["new"].nbytes > 10 * size

    bring(store, "new", 20 * size, between=lose_it)
    check_idle(store.root)


def test_refs_are_remembered(store: Store) -> None:
    ref = AdapterRef.hub("org/a0")
    store.remember(ref, key_of("a0"))
    assert store.meaning(ref) == key_of("a0")
    assert store.meaning(AdapterRef.hub("org/a0", "v2")) is None
    assert Store(store.root / "none").meaning(ref) is None


@pytest.mark.parametrize("reopened", [False, True])
def test_the_store_can_be_deleted_while_it_is_open(store: Store, reopened: bool) -> None:
    shutil.rmtree(store.root)
    if reopened:
        bring(Store(store.root), "b0")
    assert store.find(key_of("a0")) is None
    assert names_in(store) == ["b0"] * reopened
    bring(store, "a0")
    assert names_in(store) == ["b0"] * reopened + ["a0"]
    check_idle(store.root)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "emptied"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, ORIGIN_FILE])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_whole_goes(store: Store, name: str, damage: str, known: bool) -> None:
    path = next((store.root / "adapters").glob("a1-*")) / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[:-9], "longer": content + b"x"}.get(damage, b""))
    row = next(entry.row for entry in store.entries() if entry.row.name == "a1")
    assert store.verify(row) is not None
    if known:
        assert store.find(key_of("a1")) is None
    else:
        (store.root / "index.sqlite").unlink()
        store.close()
    assert names_in(Store(store.root)) == ["a2", "a0"]
    assert not path.parent.exists()
    adapter = bring(store, "a1")
    assert (adapter.path / WEIGHTS).read_bytes() == files_named("a1")[WEIGHTS]
    check_idle(store.root)


def test_what_is_damaged_and_in_use_stays(store: Store) -> None:
    adapter = store.find(key_of("a1"))
    assert adapter is not None
    with store.hold(adapter) or pytest.fail("gone"):
        os.truncate(adapter.path / WEIGHTS, 10)
        assert store.find(adapter.key) is None
        assert adapter.path.exists()
    assert store.find(adapter.key) is None
    assert not adapter.path.exists()


def test_verify_reads_every_byte(store: Store) -> None:
    assert [store.verify(entry.row) for entry in store.entries()] == [None] * 3
    path = next((store.root / "adapters").glob("a1-*"))
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (path / WEIGHTS).write_bytes(content)
    found = {entry.row.name: store.verify(entry.row) for entry in store.entries()}
    assert found["a0"] is None
    assert "digest" in str(found["a1"])
    moved = path.with_name("other-0123456789abcdef")
    path.rename(moved)
    assert Store(store.root).find(key_of("a1")) is None


def test_what_others_put_there_is_left_alone(store: Store) -> None:
    foreign = []
    for place in ("adapters", "partial", "trash", "."):
        for name in ("README", ".DS_Store", "x-0123456789abcdef"):
            foreign.append(store.root / place / name)
            foreign[-1].write_text("mine")
        if place != "trash":
            foreign.append(store.root / place / "my adapter" / "file")
            foreign[-1].parent.mkdir()
            foreign[-1].write_text("mine")
    store.close()
    assert names_in(store) == ["a1", "a2", "a0"]
    (store.root / "index.sqlite").unlink()
    assert names_in(store) == ["a1", "a2", "a0"]
    bring(store, "a3")
    store.remove(entry.row for entry in store.entries())
    assert names_in(store) == []
    assert all(path.exists() for path in foreign)


def test_both_a_whole_adapter_and_a_part_of_it(store: Store) -> None:
    path = next((store.root / "adapters").glob("a1-*"))
    shutil.copytree(path, store.root / "partial" / path.name)
    store.close()
    assert names_in(store) == ["a1", "a2", "a0"]
    check_idle(store.root)


def test_what_was_removed_by_hand_counts_for_nothing(store: Store) -> None:
    shutil.rmtree(next((store.root / "adapters").glob("a1-*")))
    small = Store(store.root, max_bytes=3 * store.entries()[0].row.nbytes)
    assert {row.name for row in small._index.rows()} == {"a0", "a1", "a2"}  # nobody has looked
    bring(small, "a3")
    assert names_in(store) == ["a2", "a0", "a3"]
    shutil.rmtree(next((store.root / "adapters").glob("a2-*")))
    store.close()
    check_idle(store.root)


def test_what_is_whole_again_is_not_thrown_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have fetched it anew since this one looked."""

    def damaged(path: Path) -> Adapter:
        raise InvalidAdapterError("x")

    monkeypatch.setattr("lora_cache.store.store.read_adapter", damaged)
    assert store.find(key_of("a0")) is None
    monkeypatch.undo()
    assert store.find(key_of("a0")) is not None
