"""Would adapters in spare GPU memory pay, where loads from host memory are at their largest?

    python3 -m benchmarks.gpu.spare_tier --json OUT       (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.spare_tier --tiny           (CPU, a minute)

Rank 64, short answers, as many clients as slots, each asking for one random adapter after the
other: first over as many adapters as there are slots, so that nothing is loaded, then over three
times as many, all in host memory.  A tier of spare GPU memory would save no more than the copy over
the bus: from `copied` (measured here) to the scatter alone (`floor.kernel`), once per activation.
So its gain per request is at most the share of requests that load, times that difference.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import rig
from benchmarks.gpu.arrivals import floor
from lora_cache.bench.figures import spread, summary
from lora_cache.bench.servers import Managed, Row
from lora_cache.bench.streams import Answer, ask
from lora_cache.bench.vllm import sampling


async def serve(server: Managed, options: argparse.Namespace, adapters: int) -> Row:
    """Clients that ask for random ones of the first `adapters`, for `options.seconds`."""
    cache: Any = server.cache
    times = cache._engine.load_times
    answers: list[Answer] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() < began + options.seconds:
            answer = Answer(rng.randrange(adapters), time.perf_counter())
            words = rig.prompt(rng, options.prompt, options.tiny)
            answers.append(await ask(server, answer, words, sampling(options.tokens)))

    await asyncio.gather(*(client(-1 - n) for n in range(options.slots)))  # kernels, slots
    answers.clear()
    times.clear()
    before = cache.stats().activations
    began = time.perf_counter()
    await asyncio.gather(*(client(n) for n in range(options.slots)))
    seconds = time.perf_counter() - began
    loads = cache.stats().activations - before
    row = summary(answers, seconds) | {"activations_per_s": round(loads / seconds, 1)}
    if times:
        for name in ("commanded", "waited", "copied", "scattered"):
            row[name] = spread([getattr(each, name) for each in times])
        # The most that the tier could save, of the mean time to the first token.
        saved = row["copied"]["median_ms"] * loads / len(answers)
        mean = 1e3 * sum(answer.first_token_s for answer in answers) / len(answers)
        row |= {"ttft_mean_ms": round(mean, 2), "saved_at_most_ms": round(saved, 2)}
    return row


async def measure(options: argparse.Namespace, root: Path) -> None:
    number = 3 * options.slots
    facts: Row = {} if options.tiny else {"floor": floor(root, options.rank)}
    model, paths = rig.write_files(root, number, rank=options.rank, tiny=options.tiny)
    record = rig.Record(options, **facts)
    engine = rig.start_vllm(
        model,
        slots=options.slots,
        host=number + 2,
        max_num_seqs=options.slots,
        rank=options.rank,
        tiny=options.tiny,
    )
    server = Managed(engine, paths, "resident", image_bytes=0)
    try:
        await server.fill(range(number))
        for adapters in (options.slots, number):
            row = await serve(server, options, adapters)
            record.add({"adapters": adapters} | row)
        await server.close()
    finally:
        engine.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rig.stop_politely()
    with tempfile.TemporaryDirectory() as directory:
        rig.register_plugin(Path(directory))
        asyncio.run(measure(options, Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
