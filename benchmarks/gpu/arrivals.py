"""One adapter arrives: how long does it take, and does anybody else notice?

    python3 -m benchmarks.gpu.arrivals --json OUT          (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.arrivals --tiny              (CPU, a minute or two)

First on an idle engine, medians of `--arrivals`: an adapter that was never packed, one that is
packed on disk (in the page cache), one in host memory, one in its slot; the time until its files
are read and digested, parts of the way as the processes report them, and from its slot to the first
token.  Then beside `--decoding` requests: such adapters are asked for one at a time, in random
order, and of each arrival the longest gap between two tokens of any other request is noted.  Then
ten cold ones within one second.  The same for plain vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import rig
from benchmarks.gpu.parts import Parts
from lora_cache.bench.figures import spread
from lora_cache.bench.servers import Managed, Plain, Row
from lora_cache.bench.streams import Answer, ask, longest_gap
from lora_cache.bench.vllm import sampling
from lora_cache.bench.ways import ManagedWay, PlainWay

BUSY = 8  # adapters of the requests that decode
_WINDOW_S = 0.4  # after an arrival
_REST_S = 0.1  # what the last arrival set in motion ends: the engine is idle


class Bench:
    def __init__(self, options: argparse.Namespace, paths: list[Path], record: rig.Record) -> None:
        self.options, self.paths = options, paths
        self.rng = random.Random(options.seed)
        self.fresh: Iterator[int] = iter(range(BUSY, len(paths)))
        self.note = record.add

    async def ask(self, server: Any, adapter: int, tokens: int) -> Answer:
        answer = Answer(adapter, time.perf_counter())
        words = rig.prompt(self.rng, 64, self.options.tiny)
        return await ask(server, answer, words, sampling(tokens))

    async def idle(self, way: Any, parts: Parts) -> None:
        """Arrivals at an idle engine."""
        number = self.options.arrivals
        adapters = [next(self.fresh) for _ in range(number)]

        async def times(kind: str) -> None:
            parts.clear()
            found: dict[str, list[float]] = {"": [], "resolved": [], "first_token": []}
            for adapter in adapters:
                await asyncio.sleep(_REST_S)
                began = time.perf_counter()
                await way.resolve(adapter)
                resolved = time.perf_counter()
                await way.to_slot(adapter)
                found[""].append(time.perf_counter() - began)
                found["resolved"].append(resolved - began)
                answer = await self.ask(way.server, adapter, 1)
                found["first_token"].append(answer.first_token_s)
            row: Row = {"table": "idle", "server": way.server.name, "from": kind}
            row |= spread(found.pop("")) | {name: spread(took) for name, took in found.items()}
            self.note(row | parts.take())

        await times("disk")
        if await way.pack(adapters):
            await times("disk, packed")
        for _ in range(self.options.slots):  # others take all slots
            await way.to_slot(next(self.fresh))
        await times("host memory")
        adapters = adapters[-self.options.slots :]
        await times("slot")

    async def beside(self, way: Any) -> None:
        """Arrivals while others decode."""
        options, server = self.options, way.server
        for adapter in range(BUSY):
            await way.to_slot(adapter)
        kinds = [kind for kind in way.kinds for _ in range(options.arrivals)]
        self.rng.shuffle(kinds)
        host = [next(self.fresh) for _ in range(options.slots - BUSY + 4)]
        prepared: dict[str, list[float]] = {kind: [] for kind in way.kinds}
        first: dict[str, list[float]] = {kind: [] for kind in way.kinds}
        running: list[Answer] = []

        async def decode(number: int) -> None:
            while True:
                answer = Answer(number % BUSY, time.perf_counter())
                running.append(answer)
                words = rig.prompt(self.rng, 64, options.tiny)
                await ask(server, answer, words, sampling(1500))

        async def settle() -> None:
            await asyncio.sleep(0.25)

        for adapter in host:
            await way.to_slot(adapter)
        tasks = [asyncio.create_task(decode(number)) for number in range(options.decoding)]
        await asyncio.sleep(3.0)
        resident = next(self.fresh)
        try:
            for turn, kind in enumerate(kinds):
                if kind == "host":
                    # Not one of those that came in last.
                    adapter = host[turn % len(host)]
                    if isinstance(way, ManagedWay):
                        await server.cache.unload(self.paths[adapter])
                        await way.prepare("host", adapter)
                elif kind == "slot":
                    adapter = resident
                    await way.prepare("slot", adapter)
                    await self.ask(server, adapter, 2)
                else:
                    adapter = next(self.fresh)
                    await way.prepare(kind, adapter)
                await settle()
                began = time.perf_counter()
                answer = await self.ask(server, adapter, 8)
                await asyncio.sleep(max(0.0, began + _WINDOW_S - time.perf_counter()))
                prepared[kind].append(longest_gap(running, began, time.perf_counter()))
                first[kind].append(answer.first_token_s)
            for kind in way.kinds:
                row = {"table": "beside", "server": server.name, "from": kind}
                row |= {"longest_gap": spread(prepared[kind]), "first_token": spread(first[kind])}
                self.note(row)
            await self.ten(way, running)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def ten(self, way: Any, running: list[Answer]) -> None:
        """Ten within one second, in turns: cold ones, ones in slots, ones that others decode with.

        What is in slots is not among what decodes, nor is what is cold: each of them is one more
        adapter in a step, and a step takes longer for it, loaded or not.
        """
        found: dict[str, list[float]] = {}
        free = self.options.slots - BUSY
        others = [next(self.fresh) for _ in range(free)]
        for kind in ("cold", "slot", "busy") * self.options.tens:
            if kind == "cold":
                adapters = [next(self.fresh) for _ in range(10)]
            elif kind == "slot":
                for adapter in others:
                    await way.to_slot(adapter)
                adapters = [others[i % free] for i in range(10)]
            else:
                adapters = [i % BUSY for i in range(10)]
            await asyncio.sleep(0.5)
            began = time.perf_counter()
            asked = []
            for adapter in adapters:
                asked.append(asyncio.create_task(self.ask(way.server, adapter, 8)))
                await asyncio.sleep(0.1)
            await asyncio.gather(*asked)
            found.setdefault(kind, []).append(longest_gap(running, began, time.perf_counter()))
        for kind, seconds in found.items():
            row: Row = {"table": "ten in a second", "server": way.server.name, "from": kind}
            self.note(row | {"longest_gap": spread(seconds)})


async def measure(options: argparse.Namespace, bench: Bench, model: Path) -> None:
    engine = rig.start_vllm(
        model,
        slots=options.slots,
        host=len(bench.paths),
        max_num_seqs=64,
        tiny=options.tiny,
    )
    try:
        for name in options.servers:
            bench.fresh = iter(range(BUSY, len(bench.paths)))
            way: Any
            if name == "vllm":
                way = PlainWay(Plain(engine, bench.paths))
            else:
                way = ManagedWay(Managed(engine, bench.paths, name, policy="lru"))
                await way.server.empty()
            parts = Parts.of(way.server)
            await asyncio.gather(
                *(bench.ask(way.server, i % BUSY, 16) for i in range(options.decoding))
            )
            await bench.idle(way, parts)
            await bench.beside(way)
            await way.server.close()
    finally:
        engine.shutdown()


def floor(root: Path, rank: int = 16) -> Any:
    """One copy from page-locked memory and one scatter, on this GPU, by themselves."""
    out = root / "floor.json"
    command = [sys.executable, "-m", "benchmarks.gpu.spike_arena", "--only-scatter", "--json"]
    subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())["scatter"][f"rank {rank} in {rank}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--servers", type=lambda t: t.split(","), default="resident,vllm")
    parser.add_argument("--arrivals", type=int, default=20, help="of each kind")
    parser.add_argument("--tens", type=int, default=10, help="times that ten come in a second")
    parser.add_argument("--decoding", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rig.stop_politely()
    number = BUSY + 4 * options.arrivals + 3 * options.slots + 10 * options.tens + 50
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        rig.register_plugin(root)
        model, paths = rig.write_files(root, number, tiny=options.tiny)
        facts: Row = {} if options.tiny else {"floor": floor(root)}
        print(json.dumps(facts), flush=True)
        bench = Bench(options, paths, rig.Record(options, **facts))
        asyncio.run(measure(options, bench, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
