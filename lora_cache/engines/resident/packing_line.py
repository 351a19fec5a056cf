"""The manager's end of the packer: starts it, hands it jobs, and starts it anew when it dies."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from itertools import count
from pathlib import Path

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.arena import Arena
from lora_cache.engines.resident.layout import Contents, Layout
from lora_cache.errors import CannotPackError, EngineError, InvalidAdapterError

_AGAIN = 2  # how often a job is tried whose packer dies under it


class _DiedError(Exception):
    pass


class PackingLine:
    """Packs adapters in another process, one after the other.

    One event loop.  A job whose caller is cancelled is carried out all the same.

    Args:
        arena: where images go.
        layouts: one a worker, in the order of their ranks.
    """

    def __init__(self, arena: Arena, layouts: list[Layout]) -> None:
        self._arena = arena
        self._layouts = layouts
        self._numbers = count(1)
        self._jobs: dict[int, asyncio.Future[jobs.Answer]] = {}
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        #: How often the packer was started anew because it had died.
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The packer's process, if it runs."""
        return self._process.pid if self._process else None

    async def examine(self, directory: Path) -> tuple[list[Contents], list[int]]:
        """What an adapter's images will hold, and how many bytes they have, one a worker.

        Raises:
            CannotPackError: vLLM's loader has to do it.
            InvalidAdapterError: its files are damaged.
            EngineError: the packer died again and again.
        """
        answer = await self._ask(jobs.Examine(next(self._numbers), str(directory)))
        assert isinstance(answer, jobs.Sizes)
        return answer.contents, answer.nbytes

    async def pack(self, directory: Path, offsets: list[int], nbytes: list[int]) -> None:
        """Write an adapter's images into the arena.

        Raises:
            as `examine`.
        """
        await self._ask(jobs.Pack(next(self._numbers), str(directory), offsets, nbytes))

    async def close(self) -> None:
        """End the packer.  Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.wait()
        if self._reading is not None:
            await asyncio.wait([self._reading])

    async def _ask(self, job: jobs.Examine | jobs.Pack) -> jobs.Answer:
        for _ in range(_AGAIN):
            answer: asyncio.Future[jobs.Answer] = asyncio.get_running_loop().create_future()
            self._jobs[job.job] = answer
            try:
                await self._send(job)
                found = await asyncio.shield(answer)
            except _DiedError:
                continue
            if not isinstance(found, jobs.Refused):
                return found
            raise (CannotPackError if found.unknown else InvalidAdapterError)(found.message)
        raise EngineError(
            f"the packer died {_AGAIN} times over {job.directory}: is there enough memory?"
        )

    async def _send(self, job: jobs.Job) -> None:
        async with self._starting:
            if self._process is None:
                self._process = await self._start()
                self._reading = asyncio.create_task(
                    self._read(self._process), name="lora-cache-packer"
                )
                _write(self._process, jobs.Layouts(self._layouts))
        _write(self._process, job)

    async def _start(self) -> Process:
        # One thread: two of them spin for each other while vLLM computes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        module = "lora_cache.engines.resident.packer"
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, str(self._arena.fd), str(self._arena.nbytes),
            stdin=PIPE, stdout=PIPE, env=environment, pass_fds=(self._arena.fd,),
        )  # fmt: skip

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        while (answer := await jobs.receive(process.stdout, jobs.ANSWERS)) is not None:
            if waiting := self._jobs.pop(answer.job, None):
                waiting.set_result(answer)
        if self._process is process:  # nobody asked it to end
            self._process = None
            self.restarts += 1
        lost, self._jobs = self._jobs, {}
        for waiting in lost.values():
            waiting.set_exception(_DiedError())
        await process.wait()


def _write(process: Process, job: jobs.Job) -> None:
    assert process.stdin is not None
    if not process.stdin.is_closing():
        process.stdin.write(jobs.frame(job))
