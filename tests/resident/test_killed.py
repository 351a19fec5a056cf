"""Whoever is killed: one clear error, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_cache import AsyncLoraCache
from lora_cache.errors import EngineDeadError
from tests.real.engines import MAX_CPU_LORAS, RESIDENT_ASYNC_LLM, start_async_llm
from tests.real.test_stock_engine import greedy, prompt

pytestmark = pytest.mark.vllm


def directories(pid: int | None = None) -> set[Path]:
    """Those that a process has made for its sockets; other tests have theirs."""
    found = Path(tempfile.gettempdir()).glob(f"lora-cache-manager-{pid or os.getpid()}-*")
    return set(found)


def packers() -> list[psutil.Process]:
    """Of this process."""
    return children("lora_cache.engines.resident.packer")


def children(name: str) -> list[psutil.Process]:
    """Processes of this one that live, and have `name` in their command line."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


async def answer(cache: AsyncLoraCache, adapter: Path) -> list[int]:
    last: Any = None
    async for output in cache.generate(prompt(1), greedy(8), adapter, timeout_s=30):
        last = output
    return list(last.outputs[0].token_ids)


@RESIDENT_ASYNC_LLM
def test_a_killed_packer_is_started_anew(
    resident_async_llm: tuple[Any, asyncio.Runner], adapters: list[Path]
) -> None:
    target, runner = resident_async_llm

    async def main() -> None:
        async with AsyncLoraCache(target, engine="resident", publish=False) as cache:
            first = await answer(cache, adapters[0])
            for number in range(1, 4):
                (packer,) = packers()
                packer.kill()
                await answer(cache, adapters[number])  # also while its death is not noticed yet
            assert await answer(cache, adapters[0]) == first
            assert cache.stats().load_failures == 0
            assert await cache.reconcile() == 0

    before = directories()
    runner.run(main())
    assert packers() == []
    assert directories() == before


@pytest.mark.long
def test_a_killed_engine_is_one_clear_error(tiny_model: Path, adapters: list[Path]) -> None:
    before, threads = directories(), threading.active_count()
    others = {child.pid for child in children("VLLM")}
    with start_async_llm(tiny_model, resident=True, max_cpu_loras=MAX_CPU_LORAS) as started:
        target, runner = started

        async def main() -> None:
            async with AsyncLoraCache(target, engine="resident", publish=False) as cache:
                await answer(cache, adapters[0])
                for child in children("VLLM"):
                    if child.pid not in others:
                        child.kill()
                for number in (0, 1, 2):
                    with pytest.raises(EngineDeadError, match="build a new engine and cache"):
                        await answer(cache, adapters[number])

        runner.run(asyncio.wait_for(main(), 240))
    assert packers() == []
    assert directories() == before
    wait_until(lambda: threading.active_count() <= threads + 2)  # vLLM's own


USER = """
import asyncio, sys, time
from pathlib import Path
import tests.real.engines as engines
from vllm import LLM
from lora_cache import AsyncLoraCache
from lora_cache.engines.resident.plugin import register
from tests.resident.test_killed import answer, packers

register()
llm = LLM(**engines.engine_arguments(Path(sys.argv[1])))

async def main():
    async with AsyncLoraCache(llm, engine="resident", publish=False) as cache:
        await answer(cache, Path(sys.argv[2]))
        print("READY", packers()[0].pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@RESIDENT_ASYNC_LLM
def test_a_killed_user_leaves_nothing(
    tiny_model: Path,
    adapters: list[Path],
    resident_async_llm: tuple[Any, asyncio.Runner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of its own, lest the start of another test's cache sweep it; short, as paths of sockets are.
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(prefix="lc-"))
    environment = {**os.environ, "LORA_CACHE_RESIDENT": "1", "TMPDIR": tempfile.gettempdir()}
    command = [sys.executable, "-c", USER, str(tiny_model), str(adapters[0])]
    user = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert user.stdout is not None
    try:
        ready = next(line for line in user.stdout if line.startswith("READY"))
        assert directories(user.pid)
    finally:
        user.send_signal(signal.SIGKILL)
        user.wait()
    packer = int(ready.split()[1])
    wait_until(lambda: not psutil.pid_exists(packer))

    target, runner = resident_async_llm

    async def main() -> None:
        async with AsyncLoraCache(target, engine="resident", publish=False):
            pass

    runner.run(main())
    assert not directories(user.pid), "the next start of anybody removes it"
