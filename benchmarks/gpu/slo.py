"""How much load fits under a promise?  Mixed ranks, real lengths, and a rate that rises.

    python3 -m benchmarks.gpu.slo --json OUT              (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.slo --tiny                  (CPU, two minutes)

The set-up of S-LoRA and Chameleon, on one GPU: 100 adapters of ranks 8 to 128, all of them in host
memory when a row begins; which rank is asked for follows a power law, and which adapter of that
rank another; Poisson arrivals; prompts and answers as long as those of the Azure LLM inference
traces 2023 (``benchmarks/data``), cut at `--longest-prompt` and `--longest-answer` tokens.

The promise: 99 of 100 first tokens come within five times the mean time to the first token of
``ideal`` (all adapters in slots, plain vLLM) at the lowest rate.  Each server gets rising rates
until it breaks the promise at two in a row.

Sizes: an adapter takes 5.2 MB for each of its rank, so the 100 take 15.5 GB, in files, in vLLM's
host memory and in the cache's.  On the GPU: 16 GB of weights, 0.67 GB for each slot of rank 128 and
one more to copy through (11.4 GB with 16), 17 GB of KV cache, and what steps and graphs take.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import rig
from benchmarks.gpu.parts import Parts
from lora_cache.bench import servers
from lora_cache.bench.figures import summary
from lora_cache.bench.free import FreeLoads
from lora_cache.bench.servers import Row, Server
from lora_cache.bench.streams import poisson, replay, zipf
from lora_cache.bench.vllm import sampling

LENGTHS = Path(__file__).parents[1] / "data" / "azure_llm_lengths.csv"
FACTOR = 5

#: What two cores serve.
TINY: Row = {
    "ranks": [1, 2, 4, 8, 16],
    "adapters": [8, 5, 3, 2, 2],
    "slots": 4,
    "rates": [2.0, 4.0, 8.0, 16.0],
    "seconds": 5.0,
    "drain": 5.0,
    "longest_prompt": 64,
    "longest_answer": 16,
}

_SHOWN = (
    *("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms"),
    *("gap_p50_ms", "gap_p99_ms", "requests_per_s"),
)


def ranks_of(options: argparse.Namespace) -> list[int]:
    """The rank of each adapter, mixed: `ideal` takes the first few."""
    numbers = zip(options.ranks, options.adapters, strict=True)
    ranks = [rank for rank, number in numbers for _ in range(number)]
    random.Random(0).shuffle(ranks)
    return ranks


def popularity(ranks: list[int], skew: float, seed: int) -> list[float]:
    """The weight of each adapter: a power law over the ranks, the lowest first, and in each."""
    rng = random.Random(seed)
    weights = [0.0] * len(ranks)
    for place, rank in enumerate(sorted(set(ranks)), 1):
        members = [adapter for adapter, its in enumerate(ranks) if its == rank]
        within = zipf(rng.sample(range(len(members)), len(members)), skew)
        for adapter, weight in zip(members, within, strict=True):
            weights[adapter] = place**-skew * weight / sum(within)
    return weights


def lengths() -> list[tuple[int, int]]:
    """Tokens of prompts and answers."""
    with LENGTHS.open(encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]


class Bench:
    def __init__(self, options: argparse.Namespace, ranks: list[int], record: rig.Record) -> None:
        self.options, self.record = options, record
        self.weights = popularity(ranks, options.skew, options.seed)
        self.lengths = lengths()
        self.promise_ms: float | None = options.promise_ms

    async def serve(self, server: Server, rate: float, seconds: float, drain_s: float) -> Row:
        """The same arrivals, prompts and lengths for every server."""
        options = self.options
        rng = random.Random(f"{options.seed} {rate} {seconds}")
        arrivals = poisson(rng, rate, seconds, self.weights)
        prompts, params = [], []
        for _ in arrivals:
            asked, answered = rng.choice(self.lengths)
            prompts.append(rig.prompt(rng, min(asked, options.longest_prompt), options.tiny))
            params.append(sampling(min(answered, options.longest_answer)))
        answers, took = await replay(server, arrivals, prompts, params, drain_s)
        return summary(answers, took)

    async def rise(self, server: Any) -> None:
        """One rate after the other, until the promise is broken twice in a row."""
        options, broken = self.options, 0
        popular = sorted(range(len(self.weights)), key=self.weights.__getitem__)
        for rate in options.rates:
            if rig.left_s(options.until) < options.seconds + options.drain:
                print(f"no time is left for {server.name} at {rate:g}/s", flush=True)
                return
            began = time.perf_counter()
            await server.fill(popular)
            filled, parts = time.perf_counter(), Parts.of(server)
            parts.clear()
            row = await self.serve(server, rate, options.seconds, options.drain)
            if self.promise_ms is None and server.name == "ideal":
                if row["ttft_mean_ms"] is None:
                    raise SystemExit(f"ideal cannot serve {rate:g}/s: begin with a lower rate")
                self.promise_ms = FACTOR * row["ttft_mean_ms"]
            kept = keeps(row, self.promise_ms)
            self.record.add(
                {"server": server.name, "rate": rate}
                | row
                | server.report()
                | parts.take()
                | {"promise_ms": self.promise_ms, "kept": kept}
                | {"fill_s": round(filled - began, 1)}
                | {"seconds": round(time.perf_counter() - filled, 1)}
            )
            broken = 0 if kept else broken + 1
            if broken == 2:
                return


def keeps(row: Row, promise_ms: float | None) -> bool:
    """Whether 99 of 100 first tokens came in time."""
    p99 = row["ttft_p99_ms"]
    return p99 is not None and (promise_ms is None or p99 <= promise_ms)


def highest(rows: list[Row]) -> dict[str, float]:
    """The highest rate of each server that kept the promise, as it did at all lower ones."""
    found: dict[str, float] = {}
    broken = set()
    for row in rows:
        if not row["kept"]:
            broken.add(row["server"])
        elif row["server"] not in broken:
            found[row["server"]] = row["rate"]
    return found


def table(rows: list[Row]) -> str:
    lines = [f"{'':16}" + "".join(f"{name:>16}" for name in _SHOWN) + "   promise"]
    for row in rows:
        shown = ("-" if row[name] is None else f"{row[name]:g}" for name in _SHOWN)
        kept = "kept" if row["kept"] else "broken"
        head = f"{row['server']} {row['rate']:g}/s"
        lines.append(f"{head:16}" + "".join(f"{text:>16}" for text in shown) + f"   {kept}")
    promise = rows[-1]["promise_ms"] if rows else None
    if promise is not None:
        lines.append(f"promise: 99 of 100 first tokens within {promise:.0f} ms")
    best = highest(rows)
    for name in dict.fromkeys(row["server"] for row in rows):
        lines.append(f"{name}: " + (f"{best[name]:g} requests/s" if name in best else "none"))
    return "\n".join(lines)


async def measure(options: argparse.Namespace, root: Path, record: rig.Record) -> None:
    ranks = ranks_of(options)
    model, paths = rig.write_files(root, len(ranks), rank=ranks, tiny=options.tiny)
    print(f"{len(paths)} adapters are in {root}", flush=True)
    engine = rig.start_vllm(
        model,
        slots=options.slots,
        host=len(paths),
        max_num_seqs=options.max_num_seqs,
        rank=max(ranks),
        max_model_len=options.longest_prompt + options.longest_answer,
        graph_tokens=options.graph_tokens,
        tiny=options.tiny,
    )
    print(f"vLLM has started, {rig.left_s(options.until):.0f} s are left", flush=True)
    bench = Bench(options, ranks, record)
    # All adapters are in host memory: packed images on disk would only take the disk's time.
    every: dict[str, Any] = {
        "ideal": servers.Ideal(engine, paths, options.slots),
        "free": FreeLoads(engine, paths, options.slots, max(ranks)),
        "vllm": servers.Plain(engine, paths),
        "stock": servers.Managed(engine, paths, "stock"),
        "resident": servers.Managed(engine, paths, "resident", image_bytes=0),
    }
    try:
        await every["ideal"].fill([])
        await bench.serve(every["ideal"], max(options.rates), 4, 60)  # kernels are compiled
        for name in options.servers:
            await bench.rise(every[name])
            await every[name].close()
    finally:
        engine.shutdown()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def numbers(kind: type[int] | type[float]) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument(
        "--servers",
        type=lambda t: t.split(","),
        default="ideal,vllm,resident",
        help="also free, stock",
    )
    parser.add_argument(
        "--adapters", type=numbers(int), default="40,25,16,11,8", help="how many of each rank"
    )
    parser.add_argument("--ranks", type=numbers(int), default="8,16,32,64,128")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rates", type=numbers(float), default="2,4,6,8")
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals, for each rate")
    parser.add_argument("--drain", type=float, default=10, help="seconds after the last arrival")
    parser.add_argument("--promise-ms", type=float, help="in place of five times the ideal's mean")
    parser.add_argument("--skew", type=float, default=1.0, help="of both power laws")
    parser.add_argument("--longest-prompt", type=int, default=4096)
    parser.add_argument("--longest-answer", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--graph-tokens", type=int, help="steps that CUDA graphs are captured for")
    parser.add_argument("--kernels", type=Path, help="configurations of LoRA kernels, a folder")
    parser.add_argument("--until", type=float, help="seconds from the start; no row ends later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=Path, help="where adapters are written")
    parser.add_argument("--json", type=Path)
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if options.servers[0] != "ideal" and options.promise_ms is None:
        parser.error("the promise is made from what ideal does first: or give --promise-ms")
    return options


def main() -> int:
    options = parse()
    rig.stop_politely()
    rig.use_kernels(options.kernels)
    nbytes = 0 if options.tiny else rig.RANK_BYTES * sum(ranks_of(options))
    record = rig.Record(options)
    with tempfile.TemporaryDirectory(dir=options.files or rig.roomy(nbytes, nbytes)) as directory:
        rig.register_plugin(Path(directory))
        try:
            asyncio.run(measure(options, Path(directory), record))
        finally:
            print(table(record.rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
