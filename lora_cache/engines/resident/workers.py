"""The manager's end of the sockets: every worker of one engine, addressed as one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from lora_cache.engines.resident import wire

logger = logging.getLogger(__name__)


class WorkerError(Exception):
    """A worker could not carry out a command.  Never leaves the engine."""


class WorkerLostError(WorkerError):
    """A worker has hung up, or died."""


_PREFIX = "lora-cache-manager-"


def _sweep() -> None:
    """Remove the directories of managers that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and path.stat().st_uid == os.geteuid() and not _is_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@dataclass(eq=False)
class Worker:
    """One tensor-parallel worker, connected."""

    hello: wire.Hello
    writer: asyncio.StreamWriter
    waiting: dict[int, asyncio.Future[wire.ToManager]] = field(default_factory=dict)


class Workers:
    """Listens for the workers of an engine, commands them all, and waits for all.

    One event loop.

    Args:
        on_displaced: called with the worker's rank when a slot changed without our word.
        on_lost: called when a worker has hung up though nobody asked it to.
    """

    def __init__(
        self,
        on_displaced: Callable[[int, wire.Displaced], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_displaced = on_displaced
        self._on_lost = on_lost
        self._ops = count(1)
        self._server: asyncio.Server | None = None
        self._directory: Path | None = None
        self._reading: set[asyncio.Task[None]] = set()
        self._came = asyncio.Event()
        self._closing = False
        self.all: list[Worker] = []

    async def listen(self) -> str:
        """Begin to listen, in a private directory of our own; returns the socket's path."""
        _sweep()
        self._directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))  # 0700
        path = self._directory / "manager"
        self._server = await asyncio.start_unix_server(self._welcome, path)
        return str(path)

    async def gather(self, timeout_s: float) -> None:
        """Wait until every worker has said hello.

        Raises:
            WorkerLostError: they did not within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self.all or len(self.all) < self.all[0].hello.world_size:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise WorkerLostError(f"{len(self.all)} workers came in {timeout_s:g} s") from None
        self.all.sort(key=lambda worker: worker.hello.rank)

    def tell(self, message: wire.ToAgent) -> None:
        """Send to all; nothing answers."""
        for worker in self.all:
            worker.writer.write(wire.encode(message))

    async def command(
        self, make: Callable[[int, int], wire.ToAgent]
    ) -> list[wire.Done | wire.Holding]:
        """Send a command to each worker, and wait for all answers.

        Args:
            make: makes the message from the number of the command and the index of the worker.

        Raises:
            WorkerLostError: a worker has died, now or before.
            WorkerError: one failed; what the others did stays done.
        """
        if self._closing or not self.all:
            raise WorkerLostError("the workers are gone")
        op = next(self._ops)
        waiting = []
        for index, worker in enumerate(self.all):
            future: asyncio.Future[wire.ToManager] = asyncio.get_running_loop().create_future()
            worker.waiting[op] = future
            worker.writer.write(wire.encode(make(op, index)))
            waiting.append(future)
        await asyncio.wait(waiting)
        answers = [answer.result() for answer in waiting]  # raises for one that died
        for answer in answers:
            if isinstance(answer, wire.Failed):
                raise WorkerError(answer.message)
        return [answer for answer in answers if isinstance(answer, wire.Done | wire.Holding)]

    async def close(self) -> None:
        """Have the workers give their slots back to vLLM, and hang up.  Idempotent."""
        self._closing = True
        self.tell(wire.Bye())
        for worker in self.all:
            with contextlib.suppress(OSError):
                await worker.writer.drain()
        if self._reading:  # they hang up when they are done
            await asyncio.wait(self._reading, timeout=10)
        for worker in self.all:
            worker.writer.close()
        self.all = []
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = wire.Frames()
        worker: Worker | None = None
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        try:
            while data := await reader.read(1 << 16):
                for message in frames.feed(data):
                    if isinstance(message, wire.Hello):
                        worker = Worker(message, writer)
                        self.all.append(worker)
                        self._came.set()
                    elif worker is not None:
                        self._take(worker, message)
        except (ConnectionError, wire.WireError):
            logger.exception("a worker's connection broke")
        finally:
            self._reading.discard(task)
            writer.close()
            if worker is not None:
                self._lose(worker)

    def _take(self, worker: Worker, message: wire.Message) -> None:
        if isinstance(message, wire.Displaced):
            self._on_displaced(worker.hello.rank, message)
        elif isinstance(message, wire.Done | wire.Failed | wire.Holding):
            answer = worker.waiting.pop(message.op, None)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _lose(self, worker: Worker) -> None:
        for answer in worker.waiting.values():
            if not answer.done():
                answer.set_exception(WorkerLostError("the worker has died"))
        worker.waiting.clear()
        if not self._closing and worker in self.all:
            self._closing = True
            self._on_lost()
