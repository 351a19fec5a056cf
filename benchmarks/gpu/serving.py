"""Serving many adapters: what does each layer bring, and how far is it from no loads at all?

    python3 -m benchmarks.gpu.serving --json OUT          (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.serving --tiny              (CPU, a minute or two)

Poisson arrivals, Zipf(1.0) popularity, prompts of 512 tokens, 64 generated, prefix caching off.
Servers: ``ideal`` (the same arrivals over as many adapters as slots, all resident, on plain vLLM),
``vllm`` (by itself), ``stock`` (vLLM's own API under our planner), ``resident``.  For each seed and
rate a *cold* row, every tier above the adapters' files being empty at its start, and a *warm* one,
with every adapter in host memory.  The time to the first token counts from the arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import rig
from benchmarks.gpu.rig import Row, Server

_SHOWN = ("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p999_ms", "requests_per_s")


async def row(server: Server, options: argparse.Namespace, seed: int, rate: float, s: float) -> Row:
    """Serve `s` seconds of arrivals."""
    rng = random.Random(f"{seed} {rate} {s}")
    arrivals = rig.poisson(rng, rate, s, options.adapters, options.zipf)
    prompts = [rig.prompt(rng, options.prompt, options.tiny) for _ in arrivals]
    params = [rig.sampling(options.tokens)] * len(arrivals)
    answers, seconds = await rig.replay(server, arrivals, prompts, params)
    return rig.summary(answers, seconds)


async def measure(options: argparse.Namespace, root: Path, rows: list[Row]) -> None:
    model, paths = rig.write_files(root, options.adapters, rank=options.rank, tiny=options.tiny)
    print(f"{len(paths)} adapters written", flush=True)
    engine = rig.start_vllm(
        model,
        slots=options.slots,
        host=options.host,
        max_num_seqs=options.max_num_seqs,
        rank=options.rank,
        tiny=options.tiny,
    )
    print("vLLM has started", flush=True)
    settings: Row = {"host_bytes": options.host_bytes} if options.host_bytes else {}
    servers: dict[str, Any] = {
        "ideal": rig.Ideal(engine, paths, options.slots),
        "vllm": rig.Plain(engine, paths),
        "stock": rig.Managed(engine, paths, "stock", **settings),
        "resident": rig.Managed(engine, paths, "resident", **settings),
    }
    everything = range(options.adapters)
    try:
        await servers["ideal"].fill(everything)
        await row(servers["ideal"], options, -1, max(options.rates), 4)  # kernels are compiled
        await servers["ideal"].close()
        for name in options.servers:
            server = servers[name]
            for seed in options.seeds:
                for rate in options.rates:
                    for kind, seconds in (("cold", options.cold), ("warm", options.warm)):
                        if not seconds or (name == "ideal" and kind == "cold"):
                            continue
                        if kind == "cold":
                            await server.empty()
                        else:
                            await server.fill(everything)
                        found: Row = {"server": name, "seed": seed, "rate": rate, "row": kind}
                        began = time.perf_counter()
                        found |= await row(server, options, seed, rate, seconds)
                        found |= server.report()
                        rows.append(found | {"seconds": round(time.perf_counter() - began, 1)})
                        print(json.dumps(rows[-1]), flush=True)
            await server.close()
    finally:
        engine.shutdown()


def table(rows: list[Row]) -> str:
    lines = [f"{'':26}" + "".join(f"{name:>16}" for name in _SHOWN)]
    for found in sorted(rows, key=lambda r: (r["row"], r["rate"], r["seed"])):
        head = f"{found['row']} {found['rate']:g}/s {found['seed']} {found['server']}"
        shown = ("-" if found[name] is None else f"{found[name]:g}" for name in _SHOWN)
        lines.append(f"{head:26}" + "".join(f"{text:>16}" for text in shown))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--servers", type=lambda t: t.split(","), default="ideal,resident,vllm")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--host", type=int, default=200, help="max_cpu_loras")
    parser.add_argument("--host-bytes", help="budget of the caches, such as 8GiB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=lambda t: [float(x) for x in t.split(",")], default="8,16")
    parser.add_argument("--seeds", type=lambda t: [int(x) for x in t.split(",")], default="0")
    parser.add_argument("--cold", type=float, default=20, help="seconds; 0 for none")
    parser.add_argument("--warm", type=float, default=60, help="seconds; 0 for none")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        rig.register_plugin(Path(directory))
        try:
            asyncio.run(measure(options, Path(directory), rows))
        finally:
            chosen = {k: v for k, v in vars(options).items() if k != "json"}
            if options.json and rows:
                raw = rig.about() | {"options": chosen, "rows": rows}
                options.json.write_text(json.dumps(raw, indent=1) + "\n")
            print(table(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
