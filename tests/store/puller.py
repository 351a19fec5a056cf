"""Processes that use a store, and die when they are told to.

They are forked from one that has imported everything, so they start in milliseconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from lora_cache.adapter import AdapterRef
from lora_cache.catalog import Catalog
from lora_cache.sources import HubSource, http
from lora_cache.store import DiskTier
from lora_cache.store.fetch import _FileFetch
from lora_cache.store.index import Index
from lora_cache.store.origin import Origin
from lora_cache.store.store import Store
from tests.hub.fixtures import USERS_OWN, Hub

#: Where a process can be made to die.
POINTS: dict[str, tuple[Any, str]] = {
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "mkdir": (os, "mkdir"),
    "fsync": (os, "fsync"),
    "put": (Index, "put"),
    "touch": (Index, "touch"),
    "remember": (Index, "remember"),
    "origin": (Origin, "write"),
    "file": (_FileFetch, "run"),
    "publish": (Store, "publish"),
    "reserve": (Store, "reserve"),
}

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.store.puller", "requests", "huggingface_hub.hf_api"])


def start(function: Callable[..., object], *args: Any) -> ForkServerProcess:
    """Call `function` in a process of its own."""
    process = _forks.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def finish(*processes: ForkServerProcess, timeout_s: float = 60) -> None:
    """Wait until they have ended well."""
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


def event() -> Any:
    return _forks.Event()


def pull(
    store: Path,
    endpoint: str,
    refs: list[str],
    options: Mapping[str, Any] = {},
    die: tuple[str, int, bool] | None = None,
) -> None:
    """Pull all of `refs`; in a process of its own."""
    from huggingface_hub import constants

    for name in USERS_OWN:
        os.environ.pop(name, None)
    os.environ["NO_PROXY"] = "127.0.0.1"
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    http._PIECE_BYTES = 1 << 14
    if die is not None:
        _die_at(*die)
    asyncio.run(_pull(store, endpoint, refs, dict(options)))


def pull_from(hub: Hub, store: Path, names: list[str], *more: Any) -> ForkServerProcess:
    """`pull` from the Hub of a test."""
    return start(pull, store, hub.endpoint, [hub.name(name) for name in names], *more)


async def _pull(store: Path, endpoint: str, refs: list[str], options: dict[str, Any]) -> None:
    disk = DiskTier(store, workers=3, **options)
    # A Hub that shares two busy cores with others may take long.
    source = HubSource(endpoint=endpoint, cache_dir=store / "none", timeout_s=60)
    catalog = Catalog({"hub": source}, disk)
    try:
        await asyncio.gather(*(catalog.resolve(AdapterRef.parse(ref)) for ref in refs))
    finally:
        await disk.close()


def _die_at(name: str, times: int, after: bool) -> None:
    owner, attribute = POINTS[name]
    real: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        mine = calls == times
        if mine and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(*args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, attribute, deadly)
