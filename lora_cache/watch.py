"""Brings memory pressure from the sampler's thread to a cache's event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from lora_cache.config import CacheConfig
from lora_cache.events import Events
from lora_cache.level import Level
from lora_cache.memory import Gpus, PressureEvent, Sampler
from lora_cache.memory.sampler import HOST

#: One of these is there where NVML may be: asking it elsewhere would only warn that it is not.
_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")


def make_sampler(config: CacheConfig) -> Sampler | None:
    """The sampler that `config` asks for, or None."""
    if not config.memory_pressure:
        return None
    has_gpus = any(map(os.path.exists, _DRIVERS))
    return Sampler(
        Gpus() if has_gpus else None,
        period_s=config.memory_period_s,
        max_share=0.001,
        host_marks=config.host_marks,
        gpu_marks=config.gpu_marks,
    )


class MemoryWatch:
    """Tells a cache when memory grows scarce.  One event loop; the sampler has a thread.

    Args:
        sampler: None watches nothing.
        owned: start the sampler, and close it in the end; else it is the caller's.
        gpus: how many of the visible GPUs the engine uses: vLLM takes the first ones.
        press: called with the levels of the host and of the GPUs, whenever one of them changes.
        events: told of each change.
        now: the cache's clock.

    Attributes:
        levels: by resource, those of GPUs once they have changed; empty if nothing is watched.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        *,
        owned: bool,
        gpus: int,
        press: Callable[[Level, Level], None],
        events: Events,
        now: Callable[[], float],
    ) -> None:
        self._sampler, self._owned, self._gpus = sampler, owned, gpus
        self._press, self._events, self._now = press, events, now
        self._stop: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.levels: dict[str, Level] = {}

    def start(self) -> None:
        """Begin; needs a running event loop."""
        if self._sampler is None:
            return
        self._loop = asyncio.get_running_loop()
        self._stop = self._sampler.subscribe(self._heard)
        # One that is shared may have told of its levels long ago.
        known = self._sampler.levels.items()
        self.levels = {HOST: Level.NONE} | {name: n for name, n in known if self._is_ours(name)}
        if any(self.levels.values()):
            self._tell()
        if self._owned:
            self._sampler.start()

    async def close(self) -> None:
        """Stop.  Idempotent."""
        self._stop()
        self._loop = None
        if self._sampler is not None and self._owned:
            # Its thread may be waiting for a slow driver.
            await asyncio.to_thread(self._sampler.close)

    def _heard(self, event: PressureEvent) -> None:
        """A level has changed.  In the sampler's thread."""
        loop = self._loop
        if loop is not None and self._is_ours(event.resource):
            with suppress(RuntimeError):  # the loop was closed, and the cache never was
                loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: PressureEvent) -> None:
        if self._loop is None:  # closed meanwhile
            return
        self.levels[event.resource] = event.after
        self._events.publish(replace(event, at_s=self._now()))
        self._tell()

    def _tell(self) -> None:
        gpus = [level for name, level in self.levels.items() if name != HOST]
        self._press(self.levels[HOST], max(gpus, default=Level.NONE))

    def _is_ours(self, resource: str) -> bool:
        latest = self._sampler.latest if self._sampler else None
        others = latest.gpus.gpus[self._gpus :] if latest else ()
        return all(gpu.uuid != resource for gpu in others)
