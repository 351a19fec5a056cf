"""Adapters that nobody has seen arrive at random: how long until each is in host memory?

    python -m benchmarks.bench_burst [--rates 4 8] [--seeds 0 1 2 3] [--adapters 24] [--rank 16]
        [--json FILE]

As after a start, when nearly every request is for another adapter.  They are of rank 16 (or another
one), of all linear layers of Llama-3.1-8B (84 MB), in the page cache, and resolved; the packer and
the arena are the real ones, and nothing is kept on disk.  The workers are not: there is no GPU, and
a message to lock an image's pages is answered after 20 ms.  (By what `spike_arena.py` measured on
an H100's machine, 84 MB would take 3 ms if they were written before, and 50 if not.)  One adapter
is loaded beforehand, then nothing happens for a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from benchmarks.bench_packing import LAYOUT, Row, bench
from benchmarks.report import write_raw
from benchmarks.shapes import write_adapters
from lora_cache.adapter import Adapter, AdapterRef
from lora_cache.bench.figures import spread
from lora_cache.engines.resident import wire
from lora_cache.engines.resident.host_images import HostImages, LoadTimes
from lora_cache.sources.local import LocalSource

LOCK_S = 0.02


class NoWorkers:
    """Answers when a worker would have."""

    async def command(self, make: Callable[[int, int], wire.ToAgent]) -> list[wire.Done]:
        await asyncio.sleep(LOCK_S if isinstance(make(0, 0), wire.PageLock) else 0)
        return []


async def burst(adapters: list[Adapter], rank: int, rate: float, seed: int) -> Row:
    """The first one alone; then the others, at random."""
    waits: list[float] = []
    rng = random.Random(seed)
    async with bench((LAYOUT.max_nbytes(rank) + (1 << 20)) * (len(adapters) + 6)) as packer:
        images = HostImages(cast(Any, NoWorkers()), packer.arena, packer.line)

        async def stage(number: int) -> None:
            began, adapter = time.perf_counter(), adapters[number]
            await images.stage(adapter, number + 1, True, LoadTimes(adapter.key))
            waits.append(time.perf_counter() - began)

        await stage(0)
        waits.clear()
        await asyncio.sleep(1)
        async with asyncio.TaskGroup() as group:
            for number in range(1, len(adapters)):
                group.create_task(stage(number))
                await asyncio.sleep(rng.expovariate(rate))
        await images.close()
    return {"rate": rate, "seed": seed} | spread(waits)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        paths = write_adapters(Path(work), options.adapters, options.rank, 0)
        source = LocalSource()
        adapters = [source.resolve(AdapterRef.local(path)) for path in paths]
        for rate in options.rates:
            for seed in options.seeds:
                rows.append(asyncio.run(burst(adapters, options.rank, rate, seed)))
    table = Table(title="from the question until an adapter is in host memory, ms")
    for column in ("arrivals/s", "seed", "median", "ninth decile", "longest"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:g}" for value in row.values()))
    Console().print(table)
    if options.json:
        write_raw(options.json, "benchmarks.bench_burst", ("torch", "safetensors"), rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
