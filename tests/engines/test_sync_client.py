"""`vllm.LLM` behind the client: one thread, in order, and the event loop is free meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cache.engines.vllm_client import SyncClient
from lora_cache.errors import EngineDeadError, RequestRefusedError

pytest.importorskip("torch")

STEP_S = 0.05


class FakeEngine:
    """An `LLMEngine` whose requests take some steps.  Notes what is called, and by whom."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.inside = threading.Lock()
        self.fails_at_step = -1
        self.steps = 0

    def _called(self, what: str) -> None:
        assert self.inside.acquire(blocking=False), "two calls at once"
        self.calls.append(what)
        self.threads.add(threading.get_ident())
        self.inside.release()

    def add_request(self, request_id: str, prompt: Any, params: int, **_: Any) -> None:
        self._called("add")
        if params <= 0:
            raise ValueError("no tokens")
        self.running[request_id] = params

    def abort_request(self, request_ids: list[str]) -> None:
        self._called("abort")
        for request_id in request_ids:
            del self.running[request_id]

    def step(self) -> list[Any]:
        self._called("step")
        assert self.running, "vLLM waits for ever, when there is nothing to do"
        assert self.inside.acquire(blocking=False)
        time.sleep(STEP_S)
        self.inside.release()
        self.steps += 1
        if self.steps == self.fails_at_step:
            raise RuntimeError("out of memory")
        outputs = []
        for request_id in list(self.running):
            self.running[request_id] -= 1
            finished = not self.running[request_id]
            if finished:
                del self.running[request_id]
            outputs.append(SimpleNamespace(request_id=request_id, finished=finished))
        return outputs

    def list_loras(self) -> set[int]:
        self._called("list")
        return {1}


class Rig:
    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.client = SyncClient(SimpleNamespace(llm_engine=self.engine))

    async def ask(self, name: str, tokens: int) -> int:
        stream = self.client.generate("words", tokens, name, None)
        async with aclosing(stream):
            return len([output async for output in stream])


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_all_calls_are_made_by_one_thread_that_ends() -> None:
    async def main() -> None:
        rig, before = Rig(), threading.active_count()
        assert await asyncio.gather(*(rig.ask(str(n), 1 + n % 3) for n in range(6))) == [
            1, 2, 3, 1, 2, 3,
        ]  # fmt: skip
        assert await rig.client.list_loras() == {1}
        assert len(rig.engine.threads) == 1
        assert threading.get_ident() not in rig.engine.threads
        await rig.client.close()
        assert threading.active_count() == before
        assert await rig.ask("again", 2) == 2  # it can be used once more
        await rig.client.close()

    run(main())


def test_those_who_come_together_share_their_steps() -> None:
    async def main() -> None:
        rig = Rig()
        await asyncio.gather(*(rig.ask(str(n), 2) for n in range(4)))
        assert rig.engine.calls == ["add"] * 4 + ["step"] * 2
        await rig.client.close()

    run(main())


def test_the_loop_is_free_while_vllm_computes() -> None:
    async def main() -> None:
        rig = Rig()
        asking = asyncio.create_task(rig.ask("slow", 6))
        rounds = 0
        while not asking.done():
            await asyncio.sleep(STEP_S / 10)
            rounds += 1
        assert rounds > 12  # two a step; ten would be, were the machine not busy
        await rig.client.close()

    run(main())


def test_one_who_leaves_has_the_request_aborted_when_that_is_done() -> None:
    async def main() -> None:
        rig = Rig()
        stream = rig.client.generate("words", 1000, "left", None)
        await anext(stream)
        await stream.aclose()
        assert not rig.engine.running
        await rig.client.close()

    run(main())


@pytest.mark.parametrize("rounds", [0, 1, 2, 5, 20])
def test_one_who_is_cancelled_at_any_time_leaves_nothing_behind(rounds: int) -> None:
    async def main() -> None:
        rig = Rig()
        other = asyncio.create_task(rig.ask("other", 8))
        task = asyncio.create_task(rig.ask("cancelled", 1000))
        for _ in range(rounds):
            await asyncio.sleep(STEP_S / 7)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "cancelled" not in rig.engine.running
        assert await other == 8
        await rig.client.close()

    run(main())


def test_a_request_that_is_refused_disturbs_nobody() -> None:
    async def main() -> None:
        rig = Rig()
        other = asyncio.create_task(rig.ask("other", 4))
        await asyncio.sleep(STEP_S)
        with pytest.raises(RequestRefusedError, match="no tokens"):
            await rig.ask("bad", 0)
        assert await other == 4
        await rig.client.close()

    run(main())


def test_a_step_that_fails_is_told_to_all_even_to_one_who_just_comes() -> None:
    async def main() -> None:
        rig = Rig()
        rig.engine.fails_at_step = 3
        first = [asyncio.create_task(rig.ask(str(n), 10)) for n in range(3)]
        while rig.engine.steps < 2:  # noqa: ASYNC110
            await asyncio.sleep(STEP_S / 10)
        late = asyncio.create_task(rig.ask("late", 10))  # comes while the step fails
        for task in (*first, late):
            with pytest.raises(EngineDeadError, match="out of memory"):
                await task
        assert rig.client.is_dead
        with pytest.raises(EngineDeadError):
            await rig.ask("later", 1)
        await rig.client.close()

    run(main())
