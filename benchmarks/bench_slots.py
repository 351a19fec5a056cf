"""How long do requests wait for a slot?  The real planner over a modelled vLLM, in its own time.

    python -m benchmarks.bench_slots [--json FILE]

The arrivals are those of `gpu/serving.py`, warm rows, request by request.  A step takes `BASE_S`,
`ADAPTER_S` for each adapter in the batch, and `PROMPT_S` for each prompt of 512 tokens in it; the
three are fitted to the gaps between tokens that `results/serving_h100.json` has (H100, shapes of
Llama-3.1-8B, CUDA graphs for all steps).  A load takes `LOAD_S`, and then until the step under way
ends.  So the model knows nothing but slots and steps: what it says of waiting is the slots' doing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.serving import arrivals_of, by_popularity
from benchmarks.report import write_raw
from lora_cache import AsyncLoraCache
from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.bench.figures import quantile
from lora_cache.planner import Transition
from lora_cache.testing import FakeEngine, FakeSource, ManualClock

BASE_S, ADAPTER_S, PROMPT_S, LOAD_S = 0.0055, 0.00065, 0.018, 0.002
ADAPTERS, TOKENS, SECONDS = 200, 64, 60.0

_BETWEEN_STEPS_S = 0.0003  # who comes now is in the next one
_TICK_S = 0.05

Row = dict[str, Any]


class _Request:
    def __init__(self, key: AdapterKey | None) -> None:
        loop = asyncio.get_running_loop()
        self.key, self.left = key, TOKENS
        self.first: asyncio.Future[None] = loop.create_future()
        self.last: asyncio.Future[None] = loop.create_future()


class ModelledVllm(FakeEngine):
    """Steps one after the other, whose lengths depend on what is in them."""

    def __init__(self, slots: int, clock: ManualClock) -> None:
        super().__init__(slots, ADAPTERS + slots, clock=clock)
        self.clock = clock
        self.new: list[_Request] = []
        self.running: list[_Request] = []
        self.is_stepping = False
        self.step_ends: list[asyncio.Future[None]] = []  # of loads that wait for one
        self.steps = self.full = 0

    async def apply(self, move: Transition, adapter: Adapter | None) -> None:
        if adapter is not None:
            await self.clock.sleep(LOAD_S)
            if self.is_stepping:
                self.step_ends.append(asyncio.get_running_loop().create_future())
                await self.step_ends[-1]
        await super().apply(move, adapter)

    async def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        request = _Request(key)
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
        took = BASE_S + ADAPTER_S * adapters + PROMPT_S * len(prompts)
        self.clock.call_at(self.clock.now() + took, self._end_step)

    def _end_step(self) -> None:
        for waiting in self.step_ends:
            waiting.set_result(None)
        self.step_ends = []
        for request in self.running:
            request.left -= 1
            if request.left == TOKENS - 1:
                request.first.set_result(None)
            if not request.left:
                request.last.set_result(None)
        self.running = [request for request in self.running if request.left]
        self.clock.call_at(self.clock.now() + _BETWEEN_STEPS_S, self._step)


async def serve(rate: float, seed: int, slots: int, policy: str) -> Row:
    """Serve the arrivals of `gpu/serving.py` with so many slots."""
    clock, source = ManualClock(), FakeSource()
    engine = ModelledVllm(slots, clock)
    arrivals, _ = arrivals_of(ADAPTERS, 1.0, seed, rate, SECONDS)
    refs = [source.ref(f"adapter-{number}") for number in range(ADAPTERS)]
    first: list[float] = []
    async with AsyncLoraCache(
        engine, sources={"fake": source}, clock=clock, policy=policy, publish=False
    ) as cache:

        async def pass_until(task: asyncio.Future[Any]) -> None:
            while not task.done():
                await clock.advance(_TICK_S)

        async def ask(due: float, adapter: int) -> None:
            async for _ in cache.generate(None, None, refs[adapter]):
                first.append(clock.now() - due)

        last_comes_first = [refs[adapter] for adapter in reversed(by_popularity(ADAPTERS, seed))]
        await pass_until(asyncio.ensure_future(cache.prefetch(last_comes_first, tier="host")))
        began, tasks = clock.now(), []
        for at, adapter in arrivals:
            await clock.advance(max(0.0, began + at - clock.now()))
            tasks.append(asyncio.ensure_future(ask(began + at, adapter)))
        await pass_until(asyncio.gather(*tasks))
        drains = cache.stats().drains
    return {
        "rate": rate,
        "seed": seed,
        "slots": slots,
        "ttft_p50_ms": round(quantile(first, 0.5) * 1e3, 1),
        "ttft_p99_ms": round(quantile(first, 0.99) * 1e3, 1),
        "all_slots_busy": round(engine.full / engine.steps, 4),
        "drains": drains,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--slots", default="24,32,40,48")
    parser.add_argument("--rates", default="8,16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    options = parser.parse_args()

    slots = [int(number) for number in options.slots.split(",")]
    table = Table(title="first token p99, ms (share of steps in which all slots are in use)")
    for name in ("rate", "seed", "a slot for each", *(f"{n} slots" for n in slots)):
        table.add_column(name, justify="right")
    rows = []
    for rate in map(float, options.rates.split(",")):
        for seed in map(int, options.seeds.split(",")):
            found = [
                asyncio.run(serve(rate, seed, number, options.policy))
                for number in (ADAPTERS, *slots)
            ]
            rows += found
            shown = [f"{row['ttft_p99_ms']:.0f} ({row['all_slots_busy']:.1%})" for row in found]
            table.add_row(f"{rate:g}", str(seed), *shown)
    Console().print(table)
    if options.json:
        model = {"base_s": BASE_S, "adapter_s": ADAPTER_S, "prompt_s": PROMPT_S, "load_s": LOAD_S}
        write_raw(options.json, "benchmarks.bench_slots", (), model=model, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
