"""From a real Hub server into the store, with every fault that a network can have."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lora_cache import AdapterRef
from lora_cache.adapter import Adapter
from lora_cache.catalog import Catalog
from lora_cache.sources import HubSource
from lora_cache.store import DiskTier
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub


def fetch(hub: Hub, store: Path, ref: str) -> Adapter:
    async def run() -> Adapter:
        disk = DiskTier(store)
        source = HubSource(endpoint=hub.endpoint, cache_dir=hub.cache_dir)
        try:
            return await Catalog({"hub": source}, disk).resolve(AdapterRef.parse(ref))
        finally:
            await disk.close()

    return asyncio.run(run())


def test_an_adapter_comes(hub: Hub, tmp_path: Path) -> None:
    files = adapter_files(2_000_000)
    commit = hub.repos.create(hub.name("sql"), files)
    adapter = fetch(hub, tmp_path / "store", hub.name("sql"))
    assert adapter.key.digest == f"hub:{hub.name('sql')}@{commit}"
    assert {
        path.name: path.read_bytes() for path in adapter.path.iterdir() if path.name in files
    } == files
