"""What does the manager itself cost?  No GPU, no vLLM: a fake engine that takes no time.

    python -m benchmarks.bench_planner [--json FILE]

Two questions, each for growing numbers of adapters that are registered, then of such that are in
host memory:

* hit: `async with cache.lease(ref)` of an adapter that sits in a slot, in and out;
* decision: the same for an adapter that must evict another one from its slot (host memory holds
  both), i.e. choosing the victim, the transition, and waking the caller.

And for how long everybody waits, once a second, while the cache draws the picture of itself that
``lora-cache status`` shows.

Beside them, in the same run: a hit in `cachetools.LRUCache` of the slots' size, the cheapest
thing that could be called an adapter cache.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cachetools
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_raw
from lora_cache import AdapterRef, AsyncLoraCache
from lora_cache.testing import FakeEngine, FakeSource

SLOTS, HOST = 32, 256
Row = dict[str, Any]


def percentiles(samples_ns: list[int]) -> dict[str, float]:
    """p50 and p99 in microseconds."""
    cuts = statistics.quantiles(samples_ns, n=100)
    return {"p50_us": round(cuts[49] / 1e3, 2), "p99_us": round(cuts[98] / 1e3, 2)}


async def measure(registered: int, host: int, policy: str, repeats: int) -> list[Row]:
    """Time hits and decisions with `registered` adapters known to the cache."""
    engine, source = FakeEngine(SLOTS, host), FakeSource()
    async with AsyncLoraCache(
        engine, sources={"fake": source}, policy=policy, publish=False
    ) as cache:
        refs = [source.ref(f"adapter-{number}") for number in range(registered)]
        for start in range(0, registered, 512):
            await asyncio.gather(
                *(cache.prefetch(ref, tier="disk") for ref in refs[start : start + 512])
            )
        await cache.warm(refs[:host])

        async def lease(ref: AdapterRef) -> int:
            began = time.perf_counter_ns()
            async with cache.lease(ref):
                pass
            return time.perf_counter_ns() - began

        hits = [await lease(refs[number % SLOTS]) for number in range(repeats)]
        before = cache.stats().slot_hits
        decisions = [await lease(refs[number % host]) for number in range(repeats // 4)]
        missed = len(decisions) - (cache.stats().slot_hits - before)
        assert cache.stats().disk_hits + cache.stats().disk_loads <= 2 * host
        assert missed > len(decisions) // 2
        pictures = []
        for _ in range(100):
            began = time.perf_counter_ns()
            cache.snapshot()
            pictures.append(time.perf_counter_ns() - began)
        common = {"policy": policy, "registered": registered, "host": host}
        return [
            {"what": "lease, slot hit", **common, **percentiles(hits)},
            {"what": "lease, evicting", **common, **percentiles(decisions)},
            {"what": "snapshot", **common, **percentiles(pictures)},
        ]


def reference(repeats: int) -> Row:
    """A hit in cachetools' LRU."""
    cache: cachetools.LRUCache[str, int] = cachetools.LRUCache(SLOTS)
    names = [f"adapter-{number}" for number in range(SLOTS)]
    for name in names:
        cache[name] = 1
    clock: Callable[[], int] = time.perf_counter_ns
    samples = []
    for number in range(repeats):
        name = names[number % SLOTS]
        began = clock()
        cache[name]
        samples.append(clock() - began)
    return {"what": "cachetools.LRUCache hit", "policy": "lru", **percentiles(samples)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--registered", default="1000,10000,100000")
    parser.add_argument("--host", default="1024,4096", help="host entries, the largest ones")
    parser.add_argument("--repeats", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    options = parser.parse_args()

    rows = [reference(options.repeats)]
    sizes = [(int(registered), HOST) for registered in options.registered.split(",")]
    sizes += [(int(host), int(host)) for host in options.host.split(",")]
    for registered, host in sizes:
        for policy in ("lru", "lfu"):
            rows += asyncio.run(measure(registered, host, policy, options.repeats))

    table = Table(title=f"{SLOTS} slots, fake engine, µs")
    for name in ("what", "policy", "registered", "in host memory", "p50", "p99"):
        table.add_column(name, justify="left" if name in ("what", "policy") else "right")
    for row in rows:
        sizes_of = [f"{row[n]:,}" if n in row else "–" for n in ("registered", "host")]
        p50, p99 = f"{row['p50_us']:.2f}", f"{row['p99_us']:.2f}"
        table.add_row(row["what"], row["policy"], *sizes_of, p50, p99)
    Console().print(table)
    if options.json:
        write_raw(options.json, "benchmarks.bench_planner", ("cachetools",), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
