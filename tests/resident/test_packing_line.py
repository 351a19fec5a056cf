"""The packer, a real process: the same bytes as in this one, and every way to fail."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lora_cache.engines.resident.arena import Arena, ArenaFullError
from lora_cache.engines.resident.jobs import Wanted
from lora_cache.engines.resident.packing_line import PackingLine
from lora_cache.errors import CannotPackError, EngineError, InvalidAdapterError
from tests.resident.layouts import plain_layout

pytest.importorskip("torch")

pytestmark = pytest.mark.long  # each starts a packer, which imports torch

Adapter = Callable[..., Path]
LAYOUTS = [plain_layout("bfloat16"), plain_layout("float32")]  # of two workers that differ


@asynccontextmanager
async def line() -> AsyncIterator[tuple[PackingLine, Arena]]:
    arena = Arena(64 << 20)
    packing = PackingLine(arena, LAYOUTS)
    try:
        yield packing, arena
    finally:
        await packing.close()
        arena.close()


async def pack(packing: PackingLine, arena: Arena, path: Path) -> list[bytes]:
    _, nbytes = await packing.examine(Wanted(str(path)))
    offsets = [arena.allocate(length) for length in nbytes]
    await packing.pack(Wanted(str(path)), offsets, nbytes)
    with mmap.mmap(arena.fd, arena.nbytes) as memory:
        return [memory[o : o + n] for o, n in zip(offsets, nbytes, strict=True)]


def here(path: Path) -> list[bytes]:
    from lora_cache.engines.resident import packing

    images = []
    for layout in LAYOUTS:
        image = np.empty(layout.nbytes(packing.examine(layout, path)), np.uint8)
        packing.pack(layout, path, image)
        images.append(image.tobytes())
    return images


def run(coroutine: Any) -> None:
    # A packer may take many seconds to import torch, and some tests start three.
    asyncio.run(asyncio.wait_for(coroutine, 240))


def test_every_worker_gets_its_image(adapter: Adapter) -> None:
    paths = [adapter(seed=number, rank=2 + number) for number in range(3)]

    async def main() -> None:
        async with line() as (packing, arena):
            found = await asyncio.gather(*(pack(packing, arena, path) for path in paths))
            assert found == [here(path) for path in paths]
            pid = packing.pid
            assert pid is not None
        assert not psutil.pid_exists(pid)

    run(main())


def test_what_it_refuses_and_that_it_goes_on(adapter: Adapter, tmp_path: Path) -> None:
    unknown = adapter(seed=7, modules_to_save=["lm_head"])
    damaged = adapter(seed=8)
    (damaged / "adapter_model.safetensors").write_bytes(b"no")
    good = adapter(seed=9)

    async def main() -> None:
        async with line() as (packing, arena):
            with pytest.raises(CannotPackError, match="modules_to_save"):
                await packing.examine(Wanted(str(unknown)))
            with pytest.raises(InvalidAdapterError):
                await packing.examine(Wanted(str(damaged)))
            with pytest.raises(InvalidAdapterError, match="nothing"):
                await packing.examine(Wanted(str(tmp_path / "nothing")))
            assert await pack(packing, arena, good) == here(good)
            assert packing.restarts == 0

    run(main())


def test_a_job_whose_packer_dies_is_done_by_the_next_one(adapter: Adapter) -> None:
    path = adapter(seed=3)

    async def main() -> None:
        async with line() as (packing, arena):
            await packing.examine(Wanted(str(path)))
            assert packing.pid is not None
            os.kill(packing.pid, signal.SIGSTOP)  # so that it cannot be faster
            job = asyncio.create_task(pack(packing, arena, path))
            await asyncio.sleep(0.05)
            os.kill(packing.pid, signal.SIGKILL)
            assert await job == here(path)
            assert packing.restarts == 1

    run(main())


def test_a_job_that_kills_every_packer_is_given_up(adapter: Adapter) -> None:
    path = adapter(seed=4)

    async def main() -> None:
        async with line() as (packing, _):
            job = asyncio.create_task(packing.examine(Wanted(str(path))))
            killed: set[int] = set()
            while not job.done():
                if packing.pid not in (None, *killed):
                    killed.add(packing.pid)  # type: ignore[arg-type]
                    os.kill(packing.pid, signal.SIGKILL)  # type: ignore[arg-type]
                await asyncio.sleep(0.01)
            with pytest.raises(EngineError, match="died 2 times"):
                await job

    run(main())


def test_room_that_is_still_in_use_is_waited_for(adapter: Adapter) -> None:
    """What is evicted while it is being kept on disk is free only afterwards."""

    async def main() -> None:
        async with line() as (packing, arena):
            assert not await packing.wait_for_room(), "nothing was freed, nothing will be"
            offset = arena.allocate(arena.nbytes)
            packing._in_use[offset] = 1
            packing.free([offset])
            with pytest.raises(ArenaFullError):
                arena.allocate(1)
            waiting = asyncio.ensure_future(packing.wait_for_room())
            await asyncio.sleep(0)
            assert not waiting.done()
            packing._leave([offset])
            assert await waiting
            assert arena.allocate(1) == offset

    run(main())


def test_pages_are_there_before_the_image(adapter: Adapter) -> None:
    async def main() -> None:
        async with line() as (packing, arena):
            nbytes = 16 << 20
            offset = arena.allocate(nbytes)
            await packing.populate([offset], [nbytes])  # there is no packer yet
            await packing.start()
            assert packing.pid is not None
            waiting = asyncio.create_task(packing.populate([offset], [nbytes]))
            await asyncio.sleep(0)
            assert packing.is_using([offset])
            await waiting
            assert not packing.is_using([offset])
            maps = psutil.Process(packing.pid).memory_maps()
            assert sum(m.rss for m in maps if "lora-cache-arena" in m.path) == nbytes
            first, _ = await pack(packing, arena, adapter())
            assert first == here(adapter())[0]

    run(main())


def test_a_packer_that_dies_while_it_brings_in_pages(adapter: Adapter) -> None:
    async def main() -> None:
        async with line() as (packing, arena):
            await packing.start()
            assert packing.pid is not None
            os.kill(packing.pid, signal.SIGSTOP)
            offset = arena.allocate(1 << 20)
            waiting = asyncio.create_task(packing.populate([offset], [1 << 20]))
            await asyncio.sleep(0)
            packing.free([offset])
            assert arena.used == 1 << 20, "the packer may still write there"
            os.kill(packing.pid, signal.SIGKILL)
            await waiting
            await packing.emptied()
            assert arena.used == 0

    run(main())


_FREEZES = """
import gc, os, sys, threading, time
from lora_cache.engines.resident import packer

threading.Thread(target=packer.main, args=(sys.argv[1:],), daemon=True).start()
while not (gc.get_freeze_count() and gc.isenabled()):
    time.sleep(0.01)
os._exit("torch" not in sys.modules or gc.get_freeze_count() < len(gc.get_objects()))
"""


def test_what_imports_brought_is_not_looked_through_for_garbage() -> None:
    """It would be, once, amid the packing, and everybody would wait for 0.1 s."""
    arena = Arena(1 << 20)
    command = [sys.executable, "-c", _FREEZES, str(arena.fd), str(arena.nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(arena.fd,)) as process:
        assert process.wait(60) == 0
    arena.close()
