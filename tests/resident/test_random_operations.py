"""Hundreds of random operations, many at once, while requests run: what must hold, holds all along.

* No hidden load: no step ever had to bring an adapter in by itself.
* No wrong answer: every token is one that stock vLLM gave before, for that content of that adapter.
* No drift: the planner, the engine and the table in vLLM's worker say the same.

The operations are drawn beforehand from a seed; how they interleave is up to the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_cache import AsyncLoraCache, CopyState
from lora_cache.errors import (
    AdapterChangedError,
    InvalidAdapterError,
    LeaseTimeoutError,
    LoadFailedError,
    PinnedError,
)
from lora_cache.testing import RandomPolicy
from tests.real.parts import write_adapter
from tests.real.test_stock_engine import greedy, prompt
from tests.resident.asking import request, runner_of

pytestmark = pytest.mark.vllm

OPERATIONS = 400
AT_ONCE = 8
TOKENS = 10
PROMPTS = 3

KINDS = {
    "generate": 40,
    "leave": 8,
    "cancel": 8,
    "forget": 3,
    "lease": 10,
    "prefetch": 8,
    "pin": 4,
    "unpin": 4,
    "unload": 5,
    "reconcile": 3,
    "replace": 4,
    "broken": 3,
}


@dataclass(frozen=True)
class Operation:
    """What to do, with which adapter and prompt; `chance` is what else is random about it."""

    kind: str
    adapter: int
    prompt: int
    chance: float


def operations(count: int, adapters: int, seed: int) -> list[Operation]:
    rng = random.Random(seed)
    popular = [1 / (number + 1) for number in range(adapters)]
    return [
        Operation(
            rng.choices(list(KINDS), list(KINDS.values()))[0],
            rng.choices(range(adapters), popular)[0],
            rng.randrange(PROMPTS),
            rng.random(),
        )
        for _ in range(count)
    ]


class Shelf:
    """Adapters in directories: two change their content again and again, one is not packed."""

    def __init__(self, root: Path, fixed: Sequence[Path]) -> None:
        self.contents: list[list[Path]] = []  # of each adapter, in the order in which they come
        self.paths: list[Path] = []
        self.versions: list[int] = []
        slow = write_adapter(root / "slow", seed=7, config={"alpha_pattern": {"q_.*": 24}})
        for number, path in enumerate([*fixed[:2], slow, *fixed[3:]]):
            changes = number in (1, 4)
            self.contents.append(
                [
                    write_adapter(root / f"content{number}.{version}", seed=100 * number + version)
                    for version in range(3)
                ]
                if changes
                else [path]
            )
            self.paths.append(root / f"changing{number}" if changes else path)
            self.versions.append(0)
            if changes:
                shutil.copytree(self.contents[-1][0], self.paths[-1])
        # vLLM's loader refuses a module that the model has not; a truncated file nobody reads.
        self.broken = [write_adapter(root / name, seed=7) for name in ("misfit", "truncated")]
        for path, (old, new) in zip(
            self.broken, ((b"attn.q_proj", b"attn.x_proj"), (b"", b"")), strict=True
        ):
            weights = path / "adapter_model.safetensors"
            whole = weights.read_bytes()
            weights.write_bytes(whole.replace(old, new) if old else whole[:-20])

    def replace(self, number: int) -> None:
        """The next content comes under the old path, at once."""
        contents = self.contents[number]
        if len(contents) > 1:
            self.versions[number] += 1
            new = contents[self.versions[number] % len(contents)]
            copy = self.paths[number] / "new"
            shutil.copyfile(new / "adapter_model.safetensors", copy)
            os.replace(copy, self.paths[number] / "adapter_model.safetensors")

    def between(self, number: int, first: int, last: int) -> set[Path]:
        """All that lay there from one version to another."""
        contents = self.contents[number]
        return {contents[version % len(contents)] for version in range(first, last + 1)}


Answers = Mapping[tuple[Path, int], list[int]]


class Trace:
    """Plays operations on one cache, and checks."""

    def __init__(self, cache: AsyncLoraCache, llm: Any, shelf: Shelf, expected: Answers) -> None:
        self.cache = cache
        self.engine: Any = cache._engine
        self.worker = runner_of(llm).lora_manager
        self.worker.unleased = 0
        self.shelf = shelf
        self.expected = expected
        self.done: Counter[str] = Counter()
        self.forgotten: list[Any] = []

    async def play(self, chosen: Sequence[Operation]) -> None:
        running: set[asyncio.Task[None]] = set()
        try:
            for operation in chosen:
                running.add(asyncio.create_task(self._one(operation)))
                await asyncio.sleep(operation.chance * 0.01)
                if operation.kind == "reconcile":
                    assert await self.cache.reconcile() == 0, "drift"
                while len(running) >= AT_ONCE:
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _one(self, operation: Operation) -> None:
        try:
            await getattr(self, f"_{operation.kind}")(operation)
        except (AdapterChangedError, LeaseTimeoutError, PinnedError) as refused:
            self.done[type(refused).__name__] += 1
        self.done[operation.kind] += 1
        self.check()

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        planner, residency = self.cache._planner, self.cache._planner.residency
        planner.check()
        assert (self.worker.unleased, self.engine.displaced) == (0, 0), "a hidden load"
        table = self.worker.attached.table.ids()
        for key in residency.leases:
            assert self.engine._id_of(key) in table, f"{key} is leased, and in no slot"
        driver = self.cache._driver
        if driver._transitions or driver._held_back is not None:
            return  # all the same once what is decided has been carried out
        ready = {copy.key for copy in residency.gpu if copy.state is not CopyState.LOADING}
        held = {slot: self.engine._key_of(n) for slot, n in enumerate(table) if n}
        assert held == self.engine.slots()
        assert ready == set(held.values())
        assert {copy.key for copy in residency.host} == set(self.engine._images)

    def check_answer(self, which: set[Path], number: int, tokens: list[int]) -> None:
        """`tokens` are, as far as they go, what stock vLLM answers with one of these contents."""
        expected = [self.expected[content, number][: len(tokens)] for content in which]
        assert tokens in expected, f"answered {tokens}, not {expected}"

    # ------------------------------------------------------------------ operations

    async def _outputs(self, operation: Operation, count: int = TOKENS) -> None:
        """Read so many outputs of a request, and check them."""
        number = operation.adapter
        first = self.shelf.versions[number]
        stream = self.cache.generate(
            prompt(operation.prompt), greedy(TOKENS), self.shelf.paths[number], timeout_s=30
        )
        try:
            tokens: list[int] = []
            async for output in stream:
                tokens = list(output.outputs[0].token_ids)
                which = self.shelf.between(number, first, self.shelf.versions[number])
                self.check_answer(which, operation.prompt, tokens)
                if len(tokens) >= count:
                    break
            assert len(tokens) >= count
        finally:
            await stream.aclose()

    async def _generate(self, operation: Operation) -> None:
        await self._outputs(operation)

    async def _leave(self, operation: Operation) -> None:
        await self._outputs(operation, 1 + int(operation.chance * (TOKENS - 1)))

    async def _cancel(self, operation: Operation) -> None:
        task = asyncio.create_task(self._outputs(operation))
        await asyncio.sleep(operation.chance * 0.1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _forget(self, operation: Operation) -> None:
        """Somebody who still has the generator, and never reads on."""
        path = self.shelf.paths[operation.adapter]
        stream = self.cache.generate(prompt(operation.prompt), greedy(TOKENS), path, timeout_s=30)
        await anext(stream)
        self.forgotten.append(stream)

    async def _lease(self, operation: Operation) -> None:
        """Of what is leased nothing but its own content answers, whatever comes meanwhile."""
        number = operation.adapter
        first = self.shelf.versions[number]
        async with self.cache.lease(self.shelf.paths[number], timeout_s=30) as lease:
            which = self.shelf.between(number, first, self.shelf.versions[number])
            answers = set()
            for turn in range(3):
                stream = self.engine.generate(
                    prompt(operation.prompt),
                    greedy(TOKENS),
                    request_id=f"{id(lease)}-{turn}",
                    key=lease.key,
                )
                last: Any = None
                async for output in stream:
                    last = output
                self.check_answer(which, operation.prompt, list(last.outputs[0].token_ids))
                answers.add(tuple(last.outputs[0].token_ids))
            assert len(answers) == 1

    async def _prefetch(self, operation: Operation) -> None:
        tier = "disk" if operation.chance < 0.3 else "host"
        await self.cache.prefetch(self.shelf.paths[operation.adapter], tier=tier)

    async def _pin(self, operation: Operation) -> None:
        tier = "gpu" if operation.chance < 0.5 else "host"
        await self.cache.pin(self.shelf.paths[operation.adapter], tier=tier, timeout_s=10)

    async def _unpin(self, operation: Operation) -> None:
        await self.cache.unpin(self.shelf.paths[operation.adapter])

    async def _unload(self, operation: Operation) -> None:
        await self.cache.unload(self.shelf.paths[operation.adapter], timeout_s=1)

    async def _reconcile(self, operation: Operation) -> None:
        pass  # by `play`: only one at a time is allowed

    async def _replace(self, operation: Operation) -> None:
        self.shelf.replace(1 if operation.chance < 0.6 else 4)

    async def _broken(self, operation: Operation) -> None:
        kind = int(operation.chance * 2)
        with pytest.raises((LoadFailedError, InvalidAdapterError)[kind]):
            await anext(self.cache.generate(prompt(0), greedy(), self.shelf.broken[kind]))


# ---------------------------------------------------------------------- the tests


@pytest.fixture
def shelf(tmp_path: Path, adapters: list[Path]) -> Shelf:
    return Shelf(tmp_path, adapters)


@pytest.fixture
def expected(llm: Any, shelf: Shelf) -> Answers:
    """What stock vLLM answers with each content of each adapter."""
    found: dict[tuple[Path, int], list[int]] = {}
    contents = [content for each in shelf.contents for content in each]
    loras = [request(1000 + n, path) for n, path in enumerate(contents)]
    for number in range(PROMPTS):
        outputs = llm.generate(
            [prompt(number)] * len(loras), greedy(TOKENS), lora_request=loras, use_tqdm=False
        )
        for path, output in zip(contents, outputs, strict=True):
            found[path, number] = list(output.outputs[0].token_ids)
    runner_of(llm).lora_manager.remove_all_adapters()
    assert len({tuple(found[path, 0]) for path in contents}) == len(contents)
    return found


def play(llm: Any, shelf: Shelf, expected: Answers, chosen: Sequence[Operation]) -> Counter[str]:
    done: Counter[str] = Counter()

    async def main() -> None:
        async with AsyncLoraCache(
            llm,
            engine="resident",
            policy=partial(RandomPolicy, 3),
            drain_after_s=0.05,
            retry_s=0.05,
            publish=False,
        ) as cache:
            trace = Trace(cache, llm, shelf, expected)
            await trace.play(chosen)
            assert await cache.reconcile() == 0
            trace.check()
            assert not cache._driver._transitions
            assert all(row.leases == 0 for row in cache.snapshot().adapters)
            done.update(trace.done, **cache.stats().to_dict())

    asyncio.run(asyncio.wait_for(main(), 120))
    return done


@pytest.mark.long
def test_nothing_is_loaded_secretly_answered_wrongly_or_out_of_step(
    resident_llm: Any, shelf: Shelf, expected: Answers
) -> None:
    done = play(resident_llm, shelf, expected, operations(OPERATIONS, len(shelf.paths), seed=20))
    assert sum(done[kind] for kind in KINDS) == OPERATIONS
    assert min(done[kind] for kind in KINDS) > 5, "everything happened"
    assert done["gpu_evictions"] > 50
    assert done["host_evictions"] > 20
    assert done["drift"] == 0
    assert resident_llm.llm_engine.list_loras() == set()


def test_a_wrong_answer_would_be_seen(
    resident_llm: Any, shelf: Shelf, expected: dict[tuple[Path, int], list[int]]
) -> None:
    for number in range(PROMPTS):  # the most popular one's are another's
        expected[shelf.paths[0], number] = expected[shelf.paths[2], number]
    with pytest.raises(AssertionError, match="answered"):
        play(resident_llm, shelf, expected, operations(40, len(shelf.paths), seed=21))


def test_a_hidden_load_would_be_seen(
    resident_llm: Any, shelf: Shelf, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unleased(self: Trace, operation: Operation) -> None:
        lora = request(0, self.shelf.paths[operation.adapter], lora_int_id=7)
        client = self.engine._client
        async for _ in client.generate(prompt(0), greedy(), "unleased", lora):
            pass

    monkeypatch.setattr(Trace, "_reconcile", unleased)
    monkeypatch.setattr(sys.modules[__name__], "AT_ONCE", 1)  # others may fail because of it
    chosen = operations(40, len(shelf.paths), seed=22)
    chosen[20:20] = [Operation("reconcile", 0, 0, 0.5)]
    with pytest.raises(AssertionError, match=r"a hidden load|drift"):
        play(resident_llm, shelf, expected, chosen)
