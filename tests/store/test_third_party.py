"""Sources that others write: found by name, and not believed."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache import AdapterRef, AsyncLoraCache
from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.catalog import Catalog
from lora_cache.errors import AdapterNotFoundError, InvalidAdapterError, LoraCacheError, SourceError
from lora_cache.sources import Remote, RemoteFile
from lora_cache.store import DiskTier
from lora_cache.store.files import folder_of
from lora_cache.testing import FakeEngine
from tests.hub.files import adapter_files

FILES = adapter_files(8_000)


class Memory:
    """An adapter from memory."""

    max_concurrent = 4
    bytes_per_s: float | None = None
    max_bytes = 1 << 30

    def __init__(self) -> None:
        self.name = "name"
        self.digest = "memory:1"
        self.content = dict(FILES)
        self.listed: Any = [
            RemoteFile(name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
            for name, content in FILES.items()
        ]
        self.offset: Any = None
        self.pieces: Any = None
        self.error: Exception | None = None

    def resolve(self, ref: AdapterRef) -> Remote:
        return Remote(AdapterKey(self.digest, self.name), ref, ref.location)

    def is_current(self, ref: AdapterRef, adapter: Adapter) -> bool:
        return True

    def files(self, remote: Remote) -> Any:
        if self.error is not None:
            raise self.error
        return self.listed

    def open(self, remote: Remote, file: RemoteFile, offset: int) -> Any:
        return MemoryBody(
            self.offset if self.offset is not None else offset,
            self.pieces if self.pieces is not None else [self.content[file.name][offset:]],
        )


class MemoryBody:
    def __init__(self, offset: int, pieces: Any) -> None:
        self.offset, self._pieces = offset, pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces

    def close(self) -> None:
        pass


def get(source: Any, store: Path) -> Adapter:
    async def main() -> Adapter:
        disk = DiskTier(store)
        try:
            return await Catalog({"memory": source}, disk).resolve(AdapterRef("memory", "it"))
        finally:
            await disk.close()

    return asyncio.run(main())


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text(), st.text())
def test_folders_are_contained_and_one_to_one(name: str, digest: str, other: str) -> None:
    folder = folder_of(AdapterKey(digest, name))
    assert Path("/store", folder).resolve().parent == Path("/store")
    assert folder.isascii()
    assert len(folder) < 128
    assert not folder.startswith((".", "-"))
    assert (folder == folder_of(AdapterKey(other, name))) is (digest == other)


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "..", "", "a\0b", "x" * 5000, "é/ü"])
def test_hostile_names_stay_in_the_store(tmp_path: Path, name: str) -> None:
    source = Memory()
    source.name = name
    store = tmp_path / "a" / "store"
    adapter = get(source, store)
    assert adapter.path.parent == store / "adapters"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} >= set(FILES)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["store"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("attribute", ["name", "digest"])
def test_names_that_are_no_text(tmp_path: Path, attribute: str) -> None:
    source = Memory()
    setattr(source, attribute, "\ud800")
    with pytest.raises(SourceError):
        get(source, tmp_path / "store")


@pytest.mark.parametrize(
    "listed",
    [
        [],
        [RemoteFile("../../adapter_config.json", 10, "sha256:0")],
        [RemoteFile(name, -5, "sha256:0") for name in FILES],
        [RemoteFile(name, 10, "md5:0") for name in FILES],
        [RemoteFile(name, 10, "") for name in FILES],
        [RemoteFile(name, 1 << 62, "sha256:0") for name in FILES],
        [*[RemoteFile(name, 10, "sha256:0") for name in FILES], RemoteFile("x.py", 1, "sha256:0")],
        None,
        [None],
    ],
)
def test_hostile_listings(tmp_path: Path, listed: Any) -> None:
    source = Memory()
    source.listed = listed
    with pytest.raises(LoraCacheError):
        get(source, tmp_path / "store")
    assert not list((tmp_path / "store").glob("adapters/*"))
    assert not list((tmp_path / "store").glob("partial/*/*.safetensors"))


@pytest.mark.parametrize("offset", [-1, 5, 1 << 40])
def test_hostile_offsets(tmp_path: Path, offset: int) -> None:
    source = Memory()
    source.offset = offset
    with pytest.raises(SourceError):
        get(source, tmp_path / "store")


@pytest.mark.parametrize("pieces", [["text"], [None], [b"x"] * 10, [b"x" * 100_000], 7])
def test_hostile_bodies(tmp_path: Path, pieces: Any) -> None:
    source = Memory()
    source.pieces = pieces
    with pytest.raises((SourceError, InvalidAdapterError)):
        get(source, tmp_path / "store")
    assert not list((tmp_path / "store").glob("adapters/*"))


def test_errors_of_others_become_ours(tmp_path: Path) -> None:
    source = Memory()
    source.error = RuntimeError("boom")
    with pytest.raises(SourceError, match="boom") as raised:
        get(source, tmp_path / "store")
    assert raised.value.__cause__ is source.error


# ---------------------------------------------------------------------- entry points


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "acme_source-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-source\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lora_cache.sources]\nacme = acme_source:AcmeSource\n"
        "absent = no_such_module:Source\nodd = acme_source:failing\n"
    )
    (site / "acme_source.py").write_text(
        "from tests.store.test_third_party import Memory\n"
        "class AcmeSource(Memory):\n    made = 0\n"
        "    def __init__(self):\n        super().__init__()\n        AcmeSource.made += 1\n"
        "def failing():\n    raise RuntimeError('boom')\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "acme_source", raising=False)


@pytest.mark.usefixtures("installed")
def test_a_source_is_found_by_the_name_in_the_ref(tmp_path: Path) -> None:
    async def main() -> None:
        cache = AsyncLoraCache(FakeEngine(), disk_dir=tmp_path / "store", publish=False)
        async with cache:
            async with cache.lease("acme://team/sql") as lease:
                assert lease.adapter.path.parent == tmp_path / "store" / "adapters"
            async with cache.lease(AdapterRef("acme", "team/other")):
                pass
            with pytest.raises(AdapterNotFoundError, match="hub, local"):
                await cache.prefetch("nobody://x")

    asyncio.run(main())
    assert sys.modules["acme_source"].AcmeSource.made == 1


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["absent", "odd"])
def test_a_source_that_cannot_be_loaded(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        cache = AsyncLoraCache(FakeEngine(), disk_dir=tmp_path / "store", publish=False)
        async with cache:
            with pytest.raises(LoraCacheError, match=name):
                await cache.prefetch(f"{name}://x")

    asyncio.run(main())
