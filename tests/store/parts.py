"""Adapters that are published without a network, and what a store must always be like."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.store import Store
from lora_cache.store.origin import Origin, OriginFile
from tests.hub.files import adapter_files


def key_of(name: str) -> AdapterKey:
    return AdapterKey(f"hub:org/{name}@{name}", name)


def origin_of(name: str, files: dict[str, bytes]) -> Origin:
    return Origin(
        digest=key_of(name).digest,
        name=name,
        source="hub",
        location=f"org/{name}",
        revision=None,
        files={
            path: OriginFile(
                nbytes=len(content), digest=f"sha256:{hashlib.sha256(content).hexdigest()}"
            )
            for path, content in files.items()
        },
        fetched=time.time(),
    )


def files_named(name: str, nbytes: int = 4_000) -> dict[str, bytes]:
    """The same for the same name, in every process."""
    return adapter_files(nbytes, seed=int.from_bytes(name.encode()[-4:], "big"))


def bring(
    store: Store, name: str, nbytes: int = 4_000, between: Callable[[Path], None] | None = None
) -> Adapter:
    """What `Fetch` does, from memory."""
    files = files_named(name, nbytes)
    origin = origin_of(name, files)
    while True:
        with store.partial(key_of(name), lambda: None) as partial:
            if partial is not None:
                store.reserve(partial, origin)
                if between is not None:
                    between(partial)
                for path, content in files.items():
                    (partial / path).write_bytes(content)
                return store.publish(partial, origin)
        # Another process brought it; a third one may have had it removed for its own since then.
        if (found := store.find(key_of(name))) is not None:
            return found


def content_of(adapter: Adapter | Path) -> dict[str, bytes]:
    path = adapter if isinstance(adapter, Path) else adapter.path
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "origin.json"}


def names_in(store: Store) -> list[str]:
    return [entry.row.name for entry in store.entries() if not entry.row.partial]


def check_agreement(root: Path) -> None:
    """Index and files agree, and what is published is whole."""
    store = Store(root)
    rows = {entry.row.folder: entry.row for entry in store.entries()}
    there = {path.name for place in ("adapters", "partial") for path in (root / place).glob("*")}
    assert {row.folder for row in store._index.rows()} == set(rows) == there
    for row in rows.values():
        if not row.partial:
            assert store.verify(row) is None
    store.close()


def check_idle(root: Path) -> None:
    """Nothing is left over."""
    check_agreement(root)
    assert not list((root / "partial").iterdir())
    assert not list((root / "trash").iterdir())
