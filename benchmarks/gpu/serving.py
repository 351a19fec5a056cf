"""Serving many adapters: what does each layer bring, and how far is it from no loads at all?

    python3 -m benchmarks.gpu.serving --json OUT          (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.serving --tiny              (CPU, a minute or two)

Poisson arrivals, Zipf(1.0) popularity, prompts of 512 tokens, 64 generated, prefix caching off.
Servers: ``ideal`` (the same arrivals over as many adapters as slots, all resident, on plain vLLM),
``free`` (as many slots under our planner, and loads that cost nothing: what waiting for a slot
costs by itself), ``vllm`` (by itself), ``stock`` (vLLM's own API under our planner), ``resident``.
For each seed and rate a *cold* row, every tier above the adapters' files being empty at its start
(with ``--uncached`` the page cache, too), and a *warm* one, with the most popular adapters in host
memory, as many as fit.  The time to the first token counts from the arrival.  ``--scenario`` sets
several options at once; those that are given as well win.
``vllm:1`` among the servers serves the first seed only.

Adapters' files take 5.2 MB for each rank and are in memory where there is room (`rig.roomy`): a
thousand of rank 8 are 42 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import rig
from benchmarks.gpu.parts import Parts
from lora_cache.bench import servers
from lora_cache.bench.figures import summary
from lora_cache.bench.free import FreeLoads
from lora_cache.bench.servers import Row, Server
from lora_cache.bench.streams import DRAIN_S, poisson, replay, zipf
from lora_cache.bench.vllm import sampling

SCENARIOS: dict[str, Row] = {
    # Few slots, and host memory for a sixth of the adapters.
    "8-slots": {"slots": 8, "host": 32, "rates": [4.0, 8.0, 16.0], "cold": 0.0, "warm": 30.0},
    # Most adapters are on disk only: host memory holds a tenth, packed images a third.
    "thousand": {
        "adapters": 1000,
        "rank": 8,
        "host": 100,
        "image_bytes": "14GiB",
        "rates": [8.0, 16.0],
        "cold": 0.0,
        "warm": 40.0,
    },
}

_SHOWN = ("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p999_ms", "requests_per_s")


def by_popularity(adapters: int, seed: int) -> list[int]:
    """The adapters, the most popular one first."""
    return random.Random(seed).sample(range(adapters), adapters)


def arrivals_of(
    adapters: int, skew: float, seed: int, rate: float, s: float
) -> tuple[list[tuple[float, int]], random.Random]:
    """(seconds, adapter) of what arrives within `s` seconds, and what prompts are drawn from."""
    rng = random.Random(f"{seed} {rate} {s}")
    return poisson(rng, rate, s, zipf(by_popularity(adapters, seed), skew)), rng


async def row(server: Server, options: argparse.Namespace, seed: int, rate: float, s: float) -> Row:
    """Serve `s` seconds of arrivals."""
    arrivals, rng = arrivals_of(options.adapters, options.zipf, seed, rate, s)
    prompts = [rig.prompt(rng, options.prompt, options.tiny) for _ in arrivals]
    params = [sampling(options.tokens)] * len(arrivals)
    answers, seconds = await replay(server, arrivals, prompts, params)
    return summary(answers, seconds)


async def serve(
    server: Server,
    paths: Sequence[Path],
    options: argparse.Namespace,
    seed: int,
    rate: float,
    record: rig.Record,
) -> None:
    """The cold row, then the warm one."""
    popular = by_popularity(options.adapters, seed)[: options.host]
    for kind, seconds in (("cold", options.cold), ("warm", options.warm)):
        if not seconds or (server.name in ("ideal", "free") and kind == "cold"):
            continue
        if rig.left_s(options.until) < seconds + DRAIN_S:
            print(f"no time is left for {server.name} at {rate:g}/s, {kind}", flush=True)
            continue
        await (server.empty() if kind == "cold" else server.fill(popular[::-1]))
        found: Row = {"server": server.name, "seed": seed, "rate": rate, "row": kind}
        if kind == "cold" and options.uncached:
            found["page_cache"] = round(rig.uncache(paths), 4)
        parts = Parts.of(server)
        parts.clear()
        began = time.perf_counter()
        found |= await row(server, options, seed, rate, seconds)
        found |= server.report() | parts.take()
        record.add(found | {"seconds": round(time.perf_counter() - began, 1)})


def schedule(options: argparse.Namespace) -> list[tuple[int, float, str]]:
    """(seed, rate, server), in order."""
    return [
        (seed, rate, name)
        for number, seed in enumerate(options.seeds)
        for rate in options.rates
        for name, seeds in options.servers.items()
        if seeds is None or number < seeds
    ]


async def measure(options: argparse.Namespace, root: Path, record: rig.Record) -> None:
    model, paths = rig.write_files(root, options.adapters, rank=options.rank, tiny=options.tiny)
    print(f"{len(paths)} adapters are in {root}", flush=True)
    engine = rig.start_vllm(
        model,
        slots=options.slots,
        host=options.host,
        max_num_seqs=options.max_num_seqs,
        rank=options.rank,
        graph_tokens=options.graph_tokens,
        tiny=options.tiny,
    )
    print("vLLM has started", flush=True)
    given = {name: getattr(options, name) for name in ("host_bytes", "image_bytes")}
    settings = {name: value for name, value in given.items() if value}
    every: dict[str, Any] = {
        "ideal": servers.Ideal(engine, paths, options.slots),
        "free": FreeLoads(engine, paths, options.slots, options.rank),
        "vllm": servers.Plain(engine, paths),
        "stock": servers.Managed(engine, paths, "stock", **settings),
        "resident": servers.Managed(engine, paths, "resident", **settings),
    }
    try:
        await every["ideal"].fill([])
        await row(every["ideal"], options, -1, max(options.rates), 4)  # kernels are compiled
        await every["ideal"].close()
        # Side by side, seed by seed: what is cut off has whole comparisons, and noise meets all.
        for seed, rate, name in schedule(options):
            await serve(every[name], paths, options, seed, rate, record)
            await every[name].close()
    finally:
        engine.shutdown()


def table(rows: list[Row]) -> str:
    lines = [f"{'':26}" + "".join(f"{name:>16}" for name in _SHOWN)]
    for found in sorted(rows, key=lambda r: (r["row"], r["rate"], r["seed"])):
        head = f"{found['row']} {found['rate']:g}/s {found['seed']} {found['server']}"
        shown = ("-" if found[name] is None else f"{found[name]:g}" for name in _SHOWN)
        lines.append(f"{head:26}" + "".join(f"{text:>16}" for text in shown))
    return "\n".join(lines)


def seeds_of(text: str) -> dict[str, int | None]:
    """How many seeds each server gets, None for all: of ``vllm:1`` the first."""
    named = (part.partition(":") for part in text.split(","))
    return {name: int(number) if colon else None for name, colon, number in named}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--scenario", choices=SCENARIOS)
    parser.add_argument("--servers", type=seeds_of, default="ideal,resident,vllm")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--host", type=int, default=200, help="max_cpu_loras")
    parser.add_argument("--host-bytes", help="budget of the caches, such as 8GiB")
    parser.add_argument("--image-bytes", help="budget of packed images on disk, such as 16GiB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=lambda t: [float(x) for x in t.split(",")], default="8,16")
    parser.add_argument("--seeds", type=lambda t: [int(x) for x in t.split(",")], default="0")
    parser.add_argument("--cold", type=float, default=20, help="seconds; 0 for none")
    parser.add_argument("--warm", type=float, default=60, help="seconds; 0 for none")
    parser.add_argument(
        "--uncached",
        action="store_true",
        help="cold rows begin with the files out of the page cache, too (--files: on a disk)",
    )
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--graph-tokens", type=int, help="steps that CUDA graphs are captured for")
    parser.add_argument("--kernels", type=Path, help="configurations of LoRA kernels, a folder")
    parser.add_argument("--until", type=float, help="seconds from the start; no row ends later")
    parser.add_argument("--files", type=Path, help="where adapters are written")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_known_args(arguments)[0].scenario
    parser.set_defaults(**SCENARIOS.get(chosen, {}))
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    rig.stop_politely()
    rig.use_kernels(options.kernels)
    each = 0 if options.tiny else rig.RANK_BYTES * options.rank
    where = options.files or Path(tempfile.gettempdir())
    if not (options.files or options.uncached):
        where = rig.roomy(each * options.adapters, each * options.host)
    record = rig.Record(options)
    with tempfile.TemporaryDirectory(dir=where) as directory:
        rig.register_plugin(Path(directory))
        try:
            asyncio.run(measure(options, Path(directory), record))
        finally:
            print(table(record.rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
