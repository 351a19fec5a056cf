"""Somebody who fetches from the Hub of the tests, and what must be true when it is done."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AdapterRef
from lora_cache.adapter import Adapter
from lora_cache.catalog import Catalog
from lora_cache.errors import LoraCacheError
from lora_cache.manifest import FILES
from lora_cache.sources import HubSource
from lora_cache.store import DiskTier, Progress
from tests.hub.files import adapter_files
from tests.hub.fixtures import Hub

#: Requests, by what they are for.
RESOLVE, LIST = r"/revision/", r"/paths-info/"
CONFIG, WEIGHTS = r"adapter_config\.json", r"adapter_model\.safetensors"

_NUMBERS = itertools.count()


class Client:
    """One store and one source, empty at first; each `get` is a new catalog over them."""

    def __init__(self, hub: Hub, directory: Path, **options: Any) -> None:
        self.hub = hub
        self.store = directory / f"store-{next(_NUMBERS)}"
        self.options: dict[str, Any] = {
            "endpoint": hub.endpoint,
            "cache_dir": hub.cache_dir,
            "token": False,
            "timeout_s": 60.0,  # what is slow is the machine, unless a test says otherwise
        }
        self.options |= options
        self.forget()

    def forget(self) -> None:
        """Be a new process, over the same store."""
        self.source = HubSource(**self.options)

    def impatient(self, place: str, timeout_s: float, *, times: int | None = None) -> None:
        """Until it forgets, wait so long for what matches, the first `times` it is asked for.

        For all else it has patience: a busy machine answers late, too.
        """
        http: Any = self.source._http
        usual, send, left = http._timeout_s, http._send, itertools.count(1)

        def sending(method: str, url: str, *rest: Any) -> Any:
            matches = re.search(place, url) and (times is None or next(left) <= times)
            http._timeout_s = timeout_s if matches else usual
            return send(method, url, *rest)

        http._send = sending

    def get(self, ref: str, progress: Callable[[Progress], None] | None = None) -> Adapter:
        found: Adapter = self.run(
            lambda catalog: catalog.resolve(AdapterRef.parse(ref), progress=progress)
        )
        return found

    def run(self, use: Callable[[Catalog], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            disk = DiskTier(self.store)
            try:
                return await use(Catalog({"hub": self.source}, disk))
            finally:
                await disk.close()

        return asyncio.run(main())

    def error(self, ref: str) -> LoraCacheError:
        """What `get` raises, which leaves no adapter behind."""
        with pytest.raises(LoraCacheError) as raised:
            self.get(ref)
        assert type(raised.value).__module__ == "lora_cache.errors"
        assert not list(self.store.glob("adapters/*"))
        return raised.value

    def files(self) -> list[Path]:
        return [path for path in self.store.rglob("*") if path.is_file()]

    def check(self, adapter: Adapter, files: dict[str, bytes]) -> None:
        """It is whole and right, and nothing else is there."""
        assert {name: (adapter.path / name).read_bytes() for name in FILES} == files
        for place in ("partial", "trash"):
            assert not list(self.store.glob(f"{place}/*"))


def create(hub: Hub, name: str = "sql", nbytes: int = 40_000, **options: Any) -> dict[str, bytes]:
    """A repository with an adapter; returns its files."""
    files = adapter_files(nbytes, seed=len(name))
    hub.repos.create(hub.name(name), files, **options)
    return files
