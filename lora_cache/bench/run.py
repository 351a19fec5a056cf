"""The small comparison of ``lora-cache bench``: one vLLM, four ways to serve adapters with it.

For each: how long an adapter takes into a slot, from where it is; how long others wait for a token
while one arrives; and what a stream of requests sees.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lora_cache.bench.figures import summary
from lora_cache.bench.servers import Ideal, Managed, Plain, Row
from lora_cache.bench.streams import Answer, ask, longest_gap, poisson, replay, zipf
from lora_cache.bench.vllm import prompt, sampling
from lora_cache.bench.ways import ManagedWay, PlainWay

SERVERS = ("ideal", "vllm", "stock", "resident")

_WINDOW_S = 0.4  # after an arrival: its load may end later than its first token comes
_BETWEEN_S = 0.2
_DRAIN_S = 20.0
_WARM_UP_S = 5.0  # of requests: what happens only once is nobody's
_ANSWER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured.

    Attributes:
        adapters: how many there are; all of them fit in host memory.
        slots: ``max_loras``; at least 3.
        rank: of every adapter.
        seconds: of arrivals in the stream of requests.
        rate: of that stream, in requests a second.
        decoding: requests that decode while adapters arrive.
        prompt_tokens, answer_tokens: of a request of the stream.
        vocabulary: prompts are made of tokens below it.
        seed: of everything that is drawn.
    """

    adapters: int = 16
    slots: int = 4
    rank: int = 16
    seconds: float = 10.0
    rate: float = 1.0
    decoding: int = 4
    prompt_tokens: int = 64
    answer_tokens: int = 16
    vocabulary: int = 400
    seed: int = 0

    @property
    def arrivals(self) -> int:
        """Adapters that arrive at an idle engine, and as many beside others."""
        return (self.adapters - self.slots - self.busy) // 2

    @property
    def busy(self) -> int:
        """Adapters of the requests that decode."""
        return min(2, self.slots - 2)


class Comparison:
    """Measures one server after the other.

    Args:
        engine: an `AsyncLLM` of `start_vllm`.
        paths: of the adapters, `settings.adapters` of them.
        note: told what is being done.
    """

    def __init__(
        self, engine: Any, paths: Sequence[Path], settings: Settings, note: Callable[[str], None]
    ) -> None:
        self.engine, self.paths, self.settings, self.note = engine, paths, settings, note

    async def run(self, servers: Sequence[str] = SERVERS) -> list[Row]:
        """Returns a row for each server; times are medians, in milliseconds."""
        self.note("warming up")
        ideal = Ideal(self.engine, self.paths, self.settings.slots)
        await ideal.fill([])
        await self._stream(ideal, _WARM_UP_S)
        await ideal.close()
        rows = []
        for name in servers:
            row: Row = {"server": name}
            server: Any
            if name == "ideal":
                server = ideal
            else:
                way = self._way(name)
                server = way.server
                await server.empty()
                row |= await self._arrive(way)
            self.note(f"{name}: requests arrive for {self.settings.seconds:g} s")
            await server.fill(range(len(self.paths)))
            row |= await self._stream(server, self.settings.seconds)
            await server.close()
            rows.append(row)
        return rows

    def _way(self, name: str) -> Any:
        if name == "vllm":
            return PlainWay(Plain(self.engine, self.paths))
        # As vLLM by itself does it: what differs is the engine's.  And who is where is known.
        return ManagedWay(Managed(self.engine, self.paths, name, policy="lru"))

    # ------------------------------------------------------------------ one at a time

    async def _arrive(self, way: Any) -> Row:
        settings = self.settings
        fresh = iter(range(settings.busy, len(self.paths)))
        self.note(f"{way.server.name}: adapters arrive, and nothing else happens")
        row = await self._idle(way, fresh)
        self.note(f"{way.server.name}: adapters arrive while {settings.decoding} requests decode")
        return row | await self._beside(way, fresh)

    async def _idle(self, way: Any, fresh: Iterator[int]) -> Row:
        """Time into a slot, from each place where an adapter can be."""
        settings = self.settings
        adapters = [next(fresh) for _ in range(settings.arrivals)]
        await way.to_slot(0)  # what happens only once is not theirs

        async def to_slot(which: Sequence[int]) -> float:
            took = []
            for adapter in which:
                began = time.perf_counter()
                await way.to_slot(adapter)
                took.append(time.perf_counter() - began)
            return _ms(median(took))

        row: Row = {"disk_ms": await to_slot(adapters)}
        row["packed_ms"] = await to_slot(adapters) if await way.pack(adapters) else None
        for _ in range(settings.slots):  # others take all slots
            await way.to_slot(next(fresh))
        row["host_ms"] = await to_slot(adapters)
        row["slot_ms"] = await to_slot(adapters[-settings.slots :])
        return row

    async def _beside(self, way: Any, fresh: Iterator[int]) -> Row:
        """The longest gap between tokens of others: nothing to load, then something."""
        async with self._decoding(way) as running:
            await way.to_slot(self.settings.busy)
            arrivals = self.settings.arrivals
            resident = [await self._gap(way, running, self.settings.busy) for _ in range(arrivals)]
            cold = [await self._gap(way, running, adapter) for adapter in fresh]
        return {"gap_slot_ms": _ms(median(resident)), "gap_disk_ms": _ms(median(cold))}

    async def _gap(self, way: Any, running: list[Answer], adapter: int) -> float:
        await asyncio.sleep(_BETWEEN_S)
        began = time.perf_counter()
        words, how = self._words(random.Random(adapter)), sampling(_ANSWER_TOKENS)
        await ask(way.server, Answer(adapter, began), words, how)
        await asyncio.sleep(max(0.0, began + _WINDOW_S - time.perf_counter()))
        return longest_gap(running, began, time.perf_counter())

    @asynccontextmanager
    async def _decoding(self, way: Any) -> AsyncIterator[list[Answer]]:
        """Requests that decode all the time; yields their answers."""
        running: list[Answer] = []

        async def decode(number: int) -> None:
            rng = random.Random(number)
            while True:
                answer = Answer(number % self.settings.busy, time.perf_counter())
                running.append(answer)
                await ask(way.server, answer, self._words(rng), sampling(400))

        tasks = [asyncio.create_task(decode(n)) for n in range(self.settings.decoding)]
        try:
            while len([answer for answer in running if answer.tokens]) < len(tasks):
                await asyncio.sleep(0.01)
                for task in tasks:
                    if task.done():
                        task.result()
            yield running
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------ many at a time

    async def _stream(self, server: Any, seconds: float) -> Row:
        """The same requests for every server."""
        settings = self.settings
        rng = random.Random(settings.seed)
        arrivals = poisson(rng, settings.rate, seconds, zipf(range(settings.adapters), 1.0))
        prompts = [self._words(rng) for _ in arrivals]
        params = [sampling(settings.answer_tokens)] * len(arrivals)
        found = summary(*await replay(server, arrivals, prompts, params, _DRAIN_S))
        return {name: found[name] for name in _SHOWN}

    def _words(self, rng: random.Random) -> Any:
        return prompt(rng, self.settings.prompt_tokens, self.settings.vocabulary)


_SHOWN = ("requests", "done", "ttft_p50_ms", "ttft_p99_ms", "requests_per_s")


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
