"""Where images go: stretches of the arena, page-locked, ready before they are needed.

A page that nobody has written yet costs ten times what writing it does: the system clears it, CUDA
locks it.  So the room of an image that makes way for another is not given back, but used again as
it is; and some are made ready ahead, in the background: one where the arena is nearly full, and
several where it is not, as after a start, when many adapters may come at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass

from lora_cache.engines.resident import wire
from lora_cache.engines.resident.arena import Arena, ArenaFullError
from lora_cache.engines.resident.packing_line import PackingLine
from lora_cache.engines.resident.workers import WorkerError, Workers

logger = logging.getLogger(__name__)

#: Rooms that wait for an image, at most.
MOST_READY = 4


@dataclass(eq=False)
class Room:
    """For one image, or for one that is gone.

    Attributes:
        offsets, nbytes: its stretch of the arena, one a worker.
        is_locked: the workers have it page-locked, or have begun to.
    """

    offsets: list[int]
    nbytes: list[int]
    is_locked: bool = False


class Rooms:
    """Allocates, page-locks and reuses rooms.  One event loop.

    Args:
        workers: of the engine.
        arena: what is allocated.
        line: whose packer writes there, and reads what it keeps on disk.

    Attributes:
        reused: how many images came into a room that was ready.
    """

    def __init__(self, workers: Workers, arena: Arena, line: PackingLine) -> None:
        self._workers = workers
        self._arena = arena
        self._line = line
        self._ready: list[Room] = []  # the oldest first
        self._preparing: asyncio.Task[None] | None = None
        self._prepared_nbytes: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_scarce = False
        self.reused = 0

    async def take(self, nbytes: list[int]) -> Room:
        """Room for an image; it need not be page-locked yet.

        Args:
            nbytes: of the image, one a worker.

        Raises:
            ArenaFullError: there is none.
            WorkerError: a worker is lost.
        """
        if (ready := self._find(nbytes)) is not None:
            return ready
        if self._preparing is not None and self._prepared_nbytes == nbytes:
            # It is well on its way, and a second one would be locked after it.
            await asyncio.wait([self._preparing])
            if (ready := self._find(nbytes)) is not None:
                return ready
        room = Room([], nbytes)
        try:
            for length in nbytes:
                room.offsets.append(await self._allocate(length))
        except BaseException:
            self._line.free(room.offsets)
            raise
        return room

    def _find(self, nbytes: list[int]) -> Room | None:
        for room in self._ready:
            # Of the same size: what is larger would waste what the budget has not.
            if room.nbytes == nbytes and not self._line.is_using(room.offsets):
                self._ready.remove(room)
                self.reused += 1
                return room
        return None

    async def lock(self, room: Room) -> None:
        """Have every worker make it ready for fast copying.

        Raises:
            WorkerError: a worker is lost; the room is still to be left.
        """
        if not room.is_locked:
            room.is_locked = True
            await self._workers.command(
                lambda op, worker: wire.PageLock(op, room.offsets[worker], room.nbytes[worker])
            )

    async def leave(self, room: Room, *, again: bool) -> None:
        """Nobody needs what is in a room any more, and no slot is being written from it.

        Args:
            again: another image is likely to come; otherwise it is given back to the system.

        Raises:
            WorkerError: a worker is lost.
        """
        if again and room.is_locked and not self._is_scarce:
            self._ready.append(room)
            if len(self._ready) > MOST_READY:  # who comes does not wait for it
                self._start(self._give_back_some([self._ready.pop(0)]))
        else:
            await self._give_back(room)
            await self._line.emptied()

    def prepare(self, nbytes: list[int]) -> None:
        """See to it that there is a room of this size, soon, and more where there is plenty."""
        if self._needs(nbytes) and not (self._preparing or self._is_scarce):
            self._prepared_nbytes = nbytes
            self._preparing = self._start(self._prepare(nbytes))

    def _needs(self, nbytes: list[int]) -> bool:
        if not any(room.nbytes == nbytes for room in self._ready):
            return True
        spare = self._arena.nbytes - self._arena.used
        return len(self._ready) < MOST_READY and spare > MOST_READY * sum(nbytes)

    def conserve(self, is_scarce: bool) -> None:
        """Memory is scarce: keep nothing that is not in use, from now on; or it is no more."""
        self._is_scarce = is_scarce
        if is_scarce:
            surplus, self._ready = self._ready, []
            self._start(self._give_back_some(surplus))

    async def close(self) -> None:
        """Wait for what goes on in the background."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="lora-cache-rooms")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _prepare(self, nbytes: list[int]) -> None:
        room = Room([], nbytes)
        try:
            for length in nbytes:
                room.offsets.append(self._arena.allocate(length))
            # By the packer, whose pages they are first: not by vLLM's processes.
            await self._line.populate(room.offsets, nbytes)
            await self.lock(room)
            await self.leave(room, again=True)
        except ArenaFullError:
            self._line.free(room.offsets)
            return
        except WorkerError:
            logger.info("no room could be made ready", exc_info=True)
            with suppress(WorkerError):
                await self._give_back(room)
            return
        finally:
            self._preparing = None
        self.prepare(nbytes)

    async def _give_back_some(self, rooms: list[Room]) -> None:
        try:
            for room in rooms:
                await self._give_back(room)
        except WorkerError:
            logger.info("memory could not be given back", exc_info=True)

    async def _allocate(self, nbytes: int) -> int:
        while True:
            try:
                return self._arena.allocate(nbytes)
            except ArenaFullError:
                if await self._line.emptied():
                    continue
                if self._ready:
                    await self._give_back(self._ready.pop(0))
                elif self._tasks:  # one is being made ready, or given back
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                # What was evicted a moment ago may still be on its way to the disk.
                elif not await self._line.wait_for_room():
                    raise

    async def _give_back(self, room: Room) -> None:
        """To the end, whoever is cancelled: nobody else knows of it any more."""
        if room.is_locked:
            await asyncio.shield(self._start(self._unlock(room)))
        else:
            self._line.free(room.offsets)

    async def _unlock(self, room: Room) -> None:
        """And free it, once no worker's GPU can read it any more."""
        await self._workers.command(lambda op, _: wire.PageUnlock(op, room.offsets))
        self._line.free(room.offsets)
