"""The host tier: packed images in the arena, page-locked by the workers that copy them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.engines.resident import jobs, wire
from lora_cache.engines.resident.arena import Arena
from lora_cache.engines.resident.layout import Contents
from lora_cache.engines.resident.packing_line import PackingLine
from lora_cache.engines.resident.rooms import Room, Rooms
from lora_cache.engines.resident.workers import WorkerError, Workers
from lora_cache.errors import CannotPackError

logger = logging.getLogger(__name__)


@dataclass
class LoadTimes:
    """Where the time of one load went, in seconds; 0 for what it did not need.

    The parts come one after the other, but ``commanded`` has ``handled`` in it, and that has what
    follows it; ``copied`` and ``scattered`` are the device's own.

    Attributes:
        examined: reading what the adapter holds, or the header of its packed image.
        packed: until its image was in host memory: packed, or read from disk.
        locked: until it was page-locked, which begins when packing does.
        commanded: from the command to the workers until the last one had published it.
        handled: the workers, from the command's arrival to the answer; the longest.
        waited: the workers, for steps that still read the slot; the longest.
        copied: the image across the bus; the longest.
        scattered: it into the slot; the longest.
    """

    key: AdapterKey
    examined: float = 0.0
    packed: float = 0.0
    locked: float = 0.0
    commanded: float = 0.0
    handled: float = 0.0
    waited: float = 0.0
    copied: float = 0.0
    scattered: float = 0.0


@dataclass(frozen=True)
class Image:
    """A packed adapter in the arena.

    Attributes:
        lora_id: vLLM's name for it.
        contents: what its image has, one a worker.
        room: where the image is; None for an adapter that only vLLM's loader knows: the workers
            keep what that made.
    """

    lora_id: int
    contents: list[Contents] = field(default_factory=list)
    room: Room | None = None

    @property
    def nbytes(self) -> int | None:
        """What it takes in host memory; None if vLLM's loader made it."""
        return None if self.room is None else sum(self.room.nbytes)


class HostImages:
    """Which adapters are in host memory.  One event loop.

    Args:
        workers: of the engine.
        arena: where images are.
        line: makes them.
    """

    def __init__(self, workers: Workers, arena: Arena, line: PackingLine) -> None:
        self._workers = workers
        self._line = line
        self._rooms = Rooms(workers, arena, line)
        self._images: dict[AdapterKey, Image] = {}
        #: How many adapters the packer did not know, so far.
        self.unpacked = 0

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._images

    def __iter__(self) -> Iterator[AdapterKey]:
        return iter(self._images)

    def get(self, key: AdapterKey) -> Image | None:
        """The image of `key`, if it is there."""
        return self._images.get(key)

    async def stage(self, adapter: Adapter, lora_id: int, urgent: bool, times: LoadTimes) -> Image:
        """The adapter's image, made if it is not there.

        Args:
            lora_id: vLLM's name for it.
            urgent: somebody waits; it overtakes what nobody waits for.
            times: gets `examined`, `packed` and `locked`.

        Raises:
            InvalidAdapterError, EngineError: it cannot be packed.
            ArenaFullError: there is no room.
            WorkerError: a worker is lost, or vLLM's loader failed.
        """
        if adapter.key in self._images:
            return self._images[adapter.key]
        try:
            image = await self._pack(adapter, lora_id, urgent, times)
        except CannotPackError as error:
            self.unpacked += 1
            # The first one is likely to be the first of many.
            level = logging.WARNING if self.unpacked == 1 else logging.INFO
            logger.log(
                level, "vLLM's own loader has to load %s, which is slower: %s", adapter.key, error
            )
            path = str(adapter.path)
            await self._workers.command(lambda op, _: wire.LoadNative(op, lora_id, -1, path))
            image = Image(lora_id)
        self._images[adapter.key] = image
        return image

    async def drop(self, keys: Iterable[AdapterKey], *, again: bool = False) -> None:
        """Let go of these; of what is not there, nothing.

        Args:
            again: they make room for another.

        Raises:
            WorkerError: a worker is lost.
        """
        gone = [self._images.pop(key) for key in keys if key in self._images]
        for room in [image.room for image in gone if image.room]:
            await self._rooms.leave(room, again=again)
        native = [image.lora_id for image in gone if image.room is None]
        if native:
            await self._workers.command(lambda op, _: wire.Unload(op, native, forget=True))

    def conserve(self, is_scarce: bool) -> None:
        """Memory is scarce: hold none beyond the images, from now on; or it is no more."""
        self._rooms.conserve(is_scarce)

    async def close(self) -> None:
        """Let the background work end; the workers may be gone."""
        await self._rooms.close()

    async def _pack(self, adapter: Adapter, lora_id: int, urgent: bool, times: LoadTimes) -> Image:
        wanted = jobs.Wanted(str(adapter.path), adapter.key.digest, adapter.stamp, urgent)
        began = time.perf_counter()
        contents, nbytes = await self._line.examine(wanted)
        times.examined = time.perf_counter() - began
        room = await self._rooms.take(nbytes)
        # Both bring the pages in, each those that the other has not yet.
        locking = asyncio.ensure_future(self._rooms.lock(room))
        try:
            await self._line.pack(wanted, room.offsets, nbytes)
            times.packed = time.perf_counter() - began - times.examined
            await locking
        except BaseException:
            await asyncio.gather(locking, return_exceptions=True)
            with suppress(WorkerError):
                await self._rooms.leave(room, again=False)
            raise
        times.locked = time.perf_counter() - began - times.examined - times.packed
        self._rooms.prepare(nbytes)
        return Image(lora_id, contents, room)
