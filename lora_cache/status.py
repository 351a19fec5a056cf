"""What a running cache tells other processes of this machine, for ``lora-cache status``.

Each cache keeps one small JSON file while it is open.  A file instead of a socket: reading it
costs the serving process nothing, and a reader cannot make it wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lora_cache._version import __version__
from lora_cache.views import AdapterStatus, Snapshot, Stats

if TYPE_CHECKING:
    from lora_cache.cache import AsyncLoraCache
    from lora_cache.plan.claims import Claims

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^(\d+)-\d+\.json(\.tmp)?$")
_TIMELESS = attrgetter(
    *(name for name in AdapterStatus.__struct_fields__ if name not in ("since_s", "reason"))
)
#: How much longer than drawing a picture takes it is until the next one.
_PAUSES = 200
_numbers = count(1)  # a process may have several caches


def status_dir() -> Path:
    """Where the files lie: ``$LORA_CACHE_STATUS_DIR``, or else the user's runtime directory."""
    base = os.environ.get("LORA_CACHE_STATUS_DIR") or os.environ.get("XDG_RUNTIME_DIR")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "lora-cache"


class StatusFile:
    """Publishes the state of one cache, at most once in `period_s`, and only what has changed.

    A disk that is full or read-only must not disturb serving: the first failure is logged, and
    ends it.

    Args:
        claims: what the engine holds in GPU memory, by its configuration; None if it has none.
    """

    def __init__(
        self, cache: AsyncLoraCache, claims: Claims | None = None, *, period_s: float = 1.0
    ) -> None:
        self._cache = cache
        self._claims = None if claims is None else asdict(claims)
        self._period_s = period_s
        self._pid = os.getpid()
        self._started_at = time.time()
        self._process_start = _process_start(self._pid)
        self.path = status_dir() / f"{self._pid}-{next(_numbers)}.json"
        self._published: object = None
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(
            self._publish(), name="lora-cache-status"
        )

    async def close(self) -> None:
        """Stop, and remove the file.  Idempotent."""
        self._closing.set()
        if self._task is not None:
            # Not cancelled: a write may be under way in a thread, and would outlive the removal.
            await asyncio.wait([self._task])
        self._remove()

    async def __aenter__(self) -> StatusFile:
        self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _publish(self) -> None:
        pause_s = self._period_s
        try:
            while not await self._closed_within(pause_s):
                began = time.perf_counter()
                stats, snapshot = self._cache.stats(), self._cache.snapshot()
                # Requests stand still while the picture is drawn, and only then.
                pause_s = max(self._period_s, _PAUSES * (time.perf_counter() - began))
                await asyncio.to_thread(self._write_if_changed, stats, snapshot)
        except Exception as error:
            logger.warning("lora-cache status will not show this cache: %s", error)
            self._remove()  # better no state than an old one

    def _write_if_changed(self, stats: Stats, snapshot: Snapshot) -> None:
        state = stats, _timeless(snapshot)
        if state != self._published:
            _write(self.path, _encode(self._record(stats, snapshot)))
            self._published = state

    async def _closed_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return self._closing.is_set()

    def _record(self, stats: Stats, snapshot: Snapshot) -> dict[str, Any]:
        return {
            "pid": self._pid,
            "process_start": self._process_start,
            "started_at": self._started_at,
            "updated_at": time.time(),
            "version": __version__,
            "engine": snapshot.engine,
            "claims": self._claims,
            "stats": stats.to_dict(),
            "snapshot": snapshot.to_dict(),
        }

    def _remove(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def read_status() -> list[dict[str, Any]]:
    """The caches that run on this machine under this user, oldest first.

    Files that were left behind by processes that have died are removed.
    """
    found = []
    with suppress(FileNotFoundError):
        for path in sorted(status_dir().iterdir()):
            name = _NAME.match(path.name)
            if name is None:
                continue
            if not _is_alive(int(name[1])):
                _discard(path)
            elif name[2] is None and (record := _read(path)) is not None:
                if record.get("process_start") == _process_start(int(name[1])):
                    found.append(record)
                else:  # the process has died, and another one has its pid
                    _discard(path)
    return sorted(found, key=lambda record: (record["started_at"], record["pid"]))


def _encode(record: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:  # the name of some directory is not UTF-8
        return json.dumps(record).encode()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    # Readers see the old file or the new one, never half a file.
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    os.replace(scratch, path)


def _read(path: Path) -> dict[str, Any] | None:
    """The record in `path`; None if it went away meanwhile, or was written by something else."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    expected = {"pid": int, "started_at": float, "updated_at": float, "stats": dict}
    expected |= {"snapshot": dict, "engine": str}
    if not isinstance(record, dict):
        return None
    whole = all(isinstance(record.get(name), kind) for name, kind in expected.items())
    return record if whole else None


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _timeless(snapshot: Snapshot) -> object:
    """`snapshot` without what changes by merely waiting."""
    others = replace(snapshot, adapters=(), at_s=0.0)
    return others, list(map(_TIMELESS, snapshot.adapters))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _process_start(pid: int) -> int | None:
    """When `pid` was started, in the kernel's ticks: tells a process from a later one of its pid.

    None where the kernel does not say.
    """
    try:
        # The name in parentheses may contain anything, parentheses too.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
