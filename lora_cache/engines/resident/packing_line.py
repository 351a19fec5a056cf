"""The manager's end of the packer: starts it, hands it jobs, and starts it anew when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.arena import Arena
from lora_cache.engines.resident.framing import WireError
from lora_cache.engines.resident.layout import Contents, Layout
from lora_cache.errors import CannotPackError, EngineError, InvalidAdapterError

logger = logging.getLogger(__name__)

_AGAIN = 2  # how often a job is tried whose packer dies under it


_Asked = jobs.Examine | jobs.Pack | jobs.Populate


class _DiedError(Exception):
    pass


class PackingLine:
    """Has adapters packed by another process, several at a time.

    One event loop.  A job whose caller is cancelled is carried out all the same.

    Args:
        arena: where images go.
        layouts: one a worker, in the order of their ranks.
        image_dir: where images are kept on disk, so that they need not be packed again.
        image_bytes: what they may take there together; 0: none are kept.

    Attributes:
        restarts: how often the packer was started anew because it had died.
        packed: images that were packed.
        read: images that were kept on disk, and only had to be read.
    """

    def __init__(
        self,
        arena: Arena,
        layouts: list[Layout],
        image_dir: Path | None = None,
        image_bytes: int = 0,
    ) -> None:
        self._arena = arena
        self._layouts = layouts
        self._arguments = [str(arena.fd), str(arena.nbytes)]
        if image_dir is not None and image_bytes:
            self._arguments += [str(image_dir), str(image_bytes)]
        self._numbers = count(1)
        self._jobs: dict[int, asyncio.Future[jobs.Answer]] = {}
        self._in_use: dict[int, int] = {}  # offset → the job that may still read or write there
        self._unwanted: set[int] = set()  # offsets that are to be free when no job uses them
        self._emptying: set[asyncio.Task[None]] = set()
        self._waiting_for_room: list[asyncio.Future[None]] = []
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self.restarts = 0
        self.packed = 0
        self.read = 0

    @property
    def pid(self) -> int | None:
        """The packer's process, if it runs."""
        return self._process.pid if self._process else None

    @property
    def is_busy(self) -> bool:
        """Whether the packer may still read or write somewhere in the arena."""
        return bool(self._in_use)

    async def start(self) -> None:
        """Start the packer, if it does not run: the first job need not wait for it then."""
        async with self._starting:
            if self._process is None:
                self._process = await self._spawn()
                self._reading = asyncio.create_task(
                    self._read(self._process), name="lora-cache-packer"
                )
                _write(self._process, jobs.Layouts(self._layouts))

    async def examine(self, wanted: jobs.Wanted) -> tuple[list[Contents], list[int]]:
        """What an adapter's images will hold, and how many bytes they have, one a worker.

        Raises:
            CannotPackError: vLLM's loader has to do it.
            InvalidAdapterError: its files are damaged.
            EngineError: the packer died again and again.
        """
        answer = await self._ask(jobs.Examine(next(self._numbers), wanted))
        assert isinstance(answer, jobs.Sizes)
        return answer.contents, answer.nbytes

    async def pack(self, wanted: jobs.Wanted, offsets: list[int], nbytes: list[int]) -> None:
        """Have an adapter's images in the arena.  Give the offsets back with `free`, only.

        Raises:
            as `examine`.
        """
        answer = await self._ask(jobs.Pack(next(self._numbers), wanted, offsets, nbytes))
        assert isinstance(answer, jobs.Packed)
        self.read += answer.read
        self.packed += len(offsets) - answer.read

    async def populate(self, offsets: list[int], nbytes: list[int]) -> None:
        """Have the packer bring in pages that an image is to come to: nobody waits for them then.

        They are in use meanwhile.  Without a packer, or if it dies, they come as they are touched.
        """
        if self._process is None:
            return
        with suppress(_DiedError):
            await self._answer_to(jobs.Populate(next(self._numbers), offsets, nbytes))

    def free(self, offsets: Iterable[int]) -> None:
        """Give stretches of the arena back, soon: once the packer has done with them."""
        for offset in offsets:
            if offset in self._in_use:
                self._unwanted.add(offset)
            else:
                self._start_emptying(offset)

    def is_using(self, offsets: Iterable[int]) -> bool:
        """Whether the packer may still read or write at one of these."""
        return any(offset in self._in_use for offset in offsets)

    async def emptied(self) -> bool:
        """Wait until what goes back to the system has; false if nothing does."""
        if self._emptying:
            await asyncio.wait(self._emptying)
            return True
        return False

    async def wait_for_room(self) -> bool:
        """Wait until something that was freed is free; false if there is nothing to wait for."""
        if not self._unwanted:
            return False
        room = asyncio.get_running_loop().create_future()
        self._waiting_for_room.append(room)
        await room
        return True

    async def close(self) -> None:
        """End the packer.  Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.wait()
        if self._reading is not None:
            await asyncio.wait([self._reading])
        await self.emptied()

    async def _ask(self, job: jobs.Examine | jobs.Pack) -> jobs.Answer:
        for _ in range(_AGAIN):
            try:
                found = await self._answer_to(job)
            except _DiedError:
                continue
            if not isinstance(found, jobs.Refused):
                return found
            raise (CannotPackError if found.unknown else InvalidAdapterError)(found.message)
        raise EngineError(
            f"the packer died {_AGAIN} times over {job.wanted.directory}: is there enough memory?"
        )

    async def _answer_to(self, job: _Asked) -> jobs.Answer:
        answer: asyncio.Future[jobs.Answer] = asyncio.get_running_loop().create_future()
        self._jobs[job.job] = answer
        await self._send(job)
        return await asyncio.shield(answer)

    async def _send(self, job: _Asked) -> None:
        await self.start()
        assert self._process is not None
        if not isinstance(job, jobs.Examine):
            self._in_use.update(dict.fromkeys(job.offsets, job.job))
        _write(self._process, job)

    async def _spawn(self) -> Process:
        # One thread: two of them spin for each other while vLLM computes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        module = "lora_cache.engines.resident.packer"
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *self._arguments,
            stdin=PIPE, stdout=PIPE, env=environment, pass_fds=(self._arena.fd,),
        )  # fmt: skip

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        frames = jobs.answer_frames()
        try:
            while data := await process.stdout.read(1 << 16):
                for answer in frames.feed(data):
                    self._take(answer)
        except WireError:
            logger.exception("the packer says what is no answer")
            process.kill()
            await process.wait()  # it may still be writing to the arena
        if self._process is process:  # nobody asked it to end
            self._process = None
            self.restarts += 1
        self._leave(list(self._in_use))
        lost, self._jobs = self._jobs, {}
        for waiting in lost.values():
            waiting.set_exception(_DiedError())
        await process.wait()

    def _take(self, answer: jobs.Answer) -> None:
        if not (isinstance(answer, jobs.Packed) and answer.saving):
            self._leave([o for o, job in self._in_use.items() if job == answer.job])
        if waiting := self._jobs.pop(answer.job, None):
            waiting.set_result(answer)

    def _leave(self, offsets: list[int]) -> None:
        """The packer uses these no longer."""
        for offset in offsets:
            del self._in_use[offset]
            if offset in self._unwanted:
                self._unwanted.discard(offset)
                self._start_emptying(offset)

    def _start_emptying(self, offset: int) -> None:
        task = asyncio.create_task(self._empty(offset), name="lora-cache-arena")
        self._emptying.add(task)
        task.add_done_callback(self._emptying.discard)

    async def _empty(self, offset: int) -> None:
        """Not on the event loop: the system takes milliseconds, and requests go on there."""
        try:
            await asyncio.to_thread(self._arena.discard, offset)
        except OSError:
            logger.exception("memory of an image could not be given back to the system")
        self._arena.free(offset)
        for room in self._waiting_for_room:
            if not room.done():
                room.set_result(None)
        self._waiting_for_room.clear()


def _write(process: Process, job: jobs.Job) -> None:
    assert process.stdin is not None
    if not process.stdin.is_closing():
        process.stdin.write(jobs.encode(job))
