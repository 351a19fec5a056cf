"""What is compared: vLLM by itself, with no loads at all, and under a cache.

All of them serve adapters by their numbers, on one vLLM that was started with the resident engine
switched on, which changes nothing until a cache attaches.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]

FIRST_ID = 1 << 29  # of adapters that plain vLLM serves; the cache's lie above

_WRITTEN_S = 30.0

_names = count()

_COUNTERS = (
    *("slot_hits", "host_hits", "disk_hits"),
    *("activations", "load_failures", "load_s"),
)


class Server(Protocol):
    """A way to serve adapters, by their numbers."""

    name: str

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]: ...

    async def empty(self) -> None:
        """No adapter is left in any tier above its files."""

    async def fill(self, adapters: Sequence[int]) -> None:
        """Bring adapters to host memory, the one that matters most last."""

    async def close(self) -> None: ...

    def report(self) -> Row:
        """Counters since `empty` or `fill`."""


class Plain:
    """VLLM by itself."""

    name = "vllm"

    def __init__(self, engine: Any, paths: Sequence[Path]) -> None:
        from vllm.lora.request import LoRARequest

        self.engine = engine
        self.requests = [
            LoRARequest(lora_name=f"plain-{i}", lora_int_id=FIRST_ID + i, lora_path=str(path))
            for i, path in enumerate(paths)
        ]

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        found: AsyncIterator[Any] = self.engine.generate(
            prompt, params, f"plain-{next(_names)}", lora_request=self.requests[adapter]
        )
        return found

    async def empty(self) -> None:
        for lora_id in list(await self.engine.list_loras()):
            await self.engine.remove_lora(lora_id)

    async def fill(self, adapters: Sequence[int]) -> None:
        for adapter in adapters:  # also those that are held: others would push them out
            await self.engine.add_lora(self.requests[adapter])

    async def close(self) -> None:
        await self.empty()

    def report(self) -> Row:
        return {}


class Ideal(Plain):
    """As many adapters as slots, all of them resident: no loads at all."""

    name = "ideal"

    def __init__(self, engine: Any, paths: Sequence[Path], slots: int) -> None:
        super().__init__(engine, paths[:slots])
        self.slots = slots

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        return super().stream(prompt, params, adapter % self.slots)

    async def fill(self, adapters: Sequence[int]) -> None:
        await super().fill(range(self.slots))


class Managed:
    """VLLM under a cache.

    Args:
        kind: of engine, "stock" or "resident"; else the name of the one that is given.
        settings: of the cache.
    """

    def __init__(self, engine: Any, paths: Sequence[Path], kind: str, **settings: Any) -> None:
        self.name, self.kind, self.engine, self.paths = kind, kind, engine, paths
        self.settings = settings
        self.cache: Any = None
        self._before: Row = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def images(self) -> Path:
        """Where packed images are, while it is open."""
        assert self._scratch is not None, "open it first"
        return Path(self._scratch.name)

    async def open(self) -> None:
        from lora_cache import AsyncLoraCache

        if self.cache is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="images-")
            settings = dict(self.settings)
            if self.kind in ("stock", "resident"):
                settings["engine"] = self.kind
            if self.kind == "resident":
                settings["image_dir"] = self.images
            self.cache = await AsyncLoraCache(self.engine, **settings).__aenter__()

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        found: AsyncIterator[Any] = self.cache.generate(prompt, params, self.paths[adapter])
        return found

    async def empty(self) -> None:
        await self.close()
        await self.open()
        if self.kind == "resident":
            await self._wake()
        self._before = self._counters()

    async def _wake(self) -> None:
        """Have the packer started before anybody waits for it, and leave nothing of what it did."""
        await self.cache.prefetch(self.paths[0], tier="host")
        await self.written()
        await self.cache.unload(self.paths[0])
        for path in self.images.iterdir():
            path.unlink()

    async def written(self) -> None:
        """Wait until packed images are on disk: they are written in the background.

        Raises:
            TimeoutError: that takes too long.
        """
        until = time.monotonic() + _WRITTEN_S
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 0.2:
            if time.monotonic() > until:
                raise TimeoutError("images are being written for too long")
            suffixes = [path.suffix for path in self.images.iterdir()]
            if len(suffixes) != seen or ".part" in suffixes:
                seen, since = len(suffixes), time.monotonic()
            await asyncio.sleep(0.02)

    async def fill(self, adapters: Sequence[int]) -> None:
        await self.open()
        await self.cache.prefetch([self.paths[a] for a in adapters], tier="host")
        self._before = self._counters()

    async def close(self) -> None:
        if self.cache is not None:
            await self.cache.close()
            self.cache = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def report(self) -> Row:
        counted = {name: n - self._before.get(name, 0) for name, n in self._counters().items()}
        load_s = counted.pop("load_s")
        return counted | {"load_mean_ms": round(1e3 * load_s / max(1, counted["activations"]), 2)}

    def _counters(self) -> Row:
        stats = self.cache.stats()
        return {name: getattr(stats, name) for name in _COUNTERS}
