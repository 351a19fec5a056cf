"""How long do requests wait for a slot?  The real planner over a modelled vLLM, in its own time.

    python -m benchmarks.bench_slots [--json FILE]
    python -m benchmarks.bench_slots --workload promise [--drain-after 1,5] [--json FILE]
    python -m benchmarks.bench_slots --slots 8 --host 32 --read 0.03,0.1 [--json FILE]

The arrivals are those of `gpu/serving.py`, warm rows, request by request, of 200 or a thousand
adapters, or the lengths and ranks are those of `gpu/slo.py` (`--workload promise`).  A step takes
`BASE_S`, so much for each adapter in the batch, and `PROMPT_S` for each prompt token in it; these
are fitted to the gaps between tokens that `results/serving_h100.json` has (and
`results/slo_h100.json`: adapters of higher ranks take longer; H100, shapes of Llama-3.1-8B, CUDA
graphs for all steps).  A load takes `LOAD_S`, and then until the step under way ends.  So the model
knows nothing but slots and steps: what it says of waiting is the slots' doing.

With ``--host`` host memory holds so many adapters, and the others are read from disk, side by side,
in ``--read`` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import slo
from benchmarks.gpu.serving import arrivals_of, by_popularity
from benchmarks.report import write_raw
from lora_cache import AsyncLoraCache
from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.bench.figures import quantile
from lora_cache.bench.servers import Row
from lora_cache.bench.streams import poisson
from lora_cache.config import CacheConfig
from lora_cache.planner import Transition
from lora_cache.state import Tier
from lora_cache.testing import FakeEngine, FakeSource, ManualClock

BASE_S, PROMPT_S, LOAD_S = 0.0055, 0.018 / 512, 0.002

_BETWEEN_STEPS_S = 0.0003  # who comes now is in the next one
_TICK_S = 0.05


@dataclass(frozen=True)
class Asked:
    """One request: `at` seconds after the start, lengths in tokens."""

    at: float
    adapter: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Workload:
    """What is asked of how many adapters, and what one of them costs a step.

    Attributes:
        asked: of a rate (requests a second), seconds and a seed, the requests and the adapters in
            order of popularity, the most popular one first.
    """

    adapters: int
    adapter_s: float
    asked: Callable[[float, float, int], tuple[list[Asked], list[int]]]


def _serving(adapters: int) -> Workload:
    def asked(rate: float, seconds: float, seed: int) -> tuple[list[Asked], list[int]]:
        arrivals, _ = arrivals_of(adapters, 1.0, seed, rate, seconds)
        found = [Asked(at, adapter, 512, 64) for at, adapter in arrivals]
        return found, by_popularity(adapters, seed)

    return Workload(adapters, 0.00065, asked)


def _promise(rate: float, seconds: float, seed: int) -> tuple[list[Asked], list[int]]:
    options = slo.parse([])
    weights = slo.popularity(slo.ranks_of(options), options.skew, 0)
    rng, lengths = random.Random(f"{seed} {rate} {seconds}"), slo.lengths()
    asked = []
    for at, adapter in poisson(rng, rate, seconds, weights):
        prompt, answer = rng.choice(lengths)
        cut = min(prompt, options.longest_prompt), min(answer, options.longest_answer)
        asked.append(Asked(at, adapter, *cut))
    return asked, sorted(range(len(weights)), key=lambda adapter: -weights[adapter])


WORKLOADS = {
    "serving": _serving(200),
    "thousand": _serving(1000),
    "promise": Workload(100, 0.0014, _promise),
}


class _Request:
    def __init__(self, key: AdapterKey | None, asked: Asked) -> None:
        loop = asyncio.get_running_loop()
        self.key, self.asked, self.left = key, asked, asked.answer
        self.first: asyncio.Future[None] = loop.create_future()
        self.last: asyncio.Future[None] = loop.create_future()


class ModelledVllm(FakeEngine):
    """Steps one after the other, whose lengths depend on what is in them.

    Args:
        disk: adapters that host memory holds, and seconds to read one that it does not; None: it
            holds all.
    """

    def __init__(
        self, slots: int, workload: Workload, clock: ManualClock, disk: tuple[int, float] | None
    ) -> None:
        entries, self.read_s = disk or (workload.adapters + slots, 0.0)
        super().__init__(slots, entries, clock=clock)
        self.clock, self.adapter_s = clock, workload.adapter_s
        self.new: list[_Request] = []
        self.running: list[_Request] = []
        self.is_stepping = False
        self.step_ends: list[asyncio.Future[None]] = []  # of loads that wait for one
        self.steps = self.full = 0

    async def apply(self, move: Transition, adapter: Adapter | None) -> None:
        if adapter is not None and adapter.key not in self._host:
            await self.clock.sleep(self.read_s)
        if move.to is Tier.GPU:
            await self.clock.sleep(LOAD_S)
            if self.is_stepping:
                self.step_ends.append(asyncio.get_running_loop().create_future())
                await self.step_ends[-1]
        await super().apply(move, adapter)

    async def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        request = _Request(key, prompt)
        self.new.append(request)
        if not self.is_stepping:
            self._step()
        await request.first
        yield None
        await request.last

    def _step(self) -> None:
        prompts, self.new = self.new, []
        self.is_stepping = bool(prompts or self.running)
        if not self.is_stepping:
            return
        self.running += prompts
        adapters = len({request.key for request in self.running})
        self.steps += 1
        self.full += adapters == self.capabilities.slots
        read = sum(request.asked.prompt for request in prompts)
        took = BASE_S + self.adapter_s * adapters + PROMPT_S * read
        self.clock.call_at(self.clock.now() + took, self._end_step)

    def _end_step(self) -> None:
        for waiting in self.step_ends:
            waiting.set_result(None)
        self.step_ends = []
        for request in self.running:
            request.left -= 1
            if not request.first.done():
                request.first.set_result(None)
            if not request.left:
                request.last.set_result(None)
        self.running = [request for request in self.running if request.left]
        self.clock.call_at(self.clock.now() + _BETWEEN_STEPS_S, self._step)


async def serve(
    workload: Workload,
    rate: float,
    seconds: float,
    seed: int,
    slots: int,
    disk: tuple[int, float] | None = None,
    **settings: Any,
) -> Row:
    """Serve the arrivals with so many slots.

    Args:
        disk: as of `ModelledVllm`.
        settings: of the cache, such as its policy.
    """
    clock, source = ManualClock(), FakeSource()
    engine = ModelledVllm(slots, workload, clock, disk)
    requests, popular = workload.asked(rate, seconds, seed)
    refs = [source.ref(f"adapter-{number}") for number in range(workload.adapters)]
    first: list[float] = []
    async with AsyncLoraCache(
        engine, sources={"fake": source}, clock=clock, publish=False, **settings
    ) as cache:

        async def pass_until(task: asyncio.Future[Any]) -> None:
            while not task.done():
                await clock.advance(_TICK_S)

        async def ask(asked: Asked) -> None:
            due = began + asked.at
            async for _ in cache.generate(asked, None, refs[asked.adapter]):
                first.append(clock.now() - due)

        last_comes_first = [refs[adapter] for adapter in reversed(popular)]
        await pass_until(asyncio.ensure_future(cache.prefetch(last_comes_first, tier="host")))
        began, tasks = clock.now(), []
        for asked in requests:
            await clock.advance(max(0.0, began + asked.at - clock.now()))
            tasks.append(asyncio.ensure_future(ask(asked)))
        await pass_until(asyncio.gather(*tasks))
        took, stats = clock.now() - began, cache.stats()
    from_disk: Row = {}
    if disk is not None:
        share = round(stats.disk_hits / len(first), 3)
        from_disk = {"host_entries": disk[0], "read_s": disk[1], "from_disk": share}
    return {
        "rate": rate,
        "seed": seed,
        "slots": slots,
        **from_disk,
        **settings,
        "ttft_p50_ms": round(quantile(first, 0.5) * 1e3, 1),
        "ttft_p99_ms": round(quantile(first, 0.99) * 1e3, 1),
        "requests_per_s": round(len(first) / took, 2),
        "all_slots_busy": round(engine.full / engine.steps, 4),
        "drains": stats.drains,
    }


def table(rows: Sequence[Row]) -> Table:
    """A line for each rate, time to read, patience and seed, a column for each number of slots."""
    found = Table(title="first token p50 / p99, ms (share of steps in which all slots are in use)")
    slots = list(dict.fromkeys(row["slots"] for row in rows))
    heads = {"rate": "rate", "read, s": "read_s", "drain after, s": "drain_after_s", "seed": "seed"}
    heads = {name: of for name, of in heads.items() if of in rows[0]}
    for name in (*heads, *(f"{number} slots" for number in slots)):
        found.add_column(name, justify="right")
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        line = tuple(f"{row[of]:g}" for of in heads.values())
        times = f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f}"
        lines.setdefault(line, []).append(f"{times} ({row['all_slots_busy']:.1%})")
    for line, shown in lines.items():
        found.add_row(*line, *shown)
    return found


def main() -> int:
    def numbers(kind: type[int] | type[float]) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    patience = CacheConfig.model_fields["drain_after_s"].default
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="serving")
    parser.add_argument("--slots", type=numbers(int), default="24,32,40,48,200")
    parser.add_argument("--rates", type=numbers(float), default="8,16")
    parser.add_argument("--seeds", type=numbers(int), default="0,1,2")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--drain-after", type=numbers(float), default=[patience], help="seconds")
    parser.add_argument("--host", type=int, help="adapters that host memory holds (default: all)")
    parser.add_argument("--read", type=numbers(float), default=[0.03], help="seconds, with --host")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    options = parser.parse_args()

    workload = WORKLOADS[options.workload]
    settings = [{"policy": options.policy, "drain_after_s": s} for s in options.drain_after]
    disks = [None] if options.host is None else [(options.host, read) for read in options.read]
    rows = [
        asyncio.run(serve(workload, rate, options.seconds, seed, slots, disk, **how))
        for rate in options.rates
        for disk in disks
        for how in settings
        for seed in options.seeds
        for slots in options.slots
    ]
    Console().print(table(rows))
    if options.json:
        costs = {"base_s": BASE_S, "adapter_s": workload.adapter_s, "prompt_token_s": PROMPT_S}
        model = costs | {"load_s": LOAD_S, "workload": options.workload}
        write_raw(options.json, "benchmarks.bench_slots", (), model=model, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
