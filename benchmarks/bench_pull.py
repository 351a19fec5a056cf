"""How fast do adapters come from the Hub?  `pull` beside plain `snapshot_download`.

    python -m benchmarks.bench_pull [--mix 50x4 --mix 12x60] [--workers 4] [--json FILE]

Twice: many small adapters, where requests are what counts, and few large ones, where bytes are.

From a Hub on this machine, in processes of its own (`tests/hub`: a real server, and before it the
real Hub's manners: a commit to ask for, a redirect to a CDN, `Range`), with empty caches:

* one by one: `snapshot_download`, one adapter after the other;
* pool: `snapshot_download` in a pool of threads;
* pull: a `Catalog` over a `DiskTier` of as many workers, as `lora-cache pull` does it, with digests
  verified and files synced to the disk.

Each in a process of its own, in turn, timed without its imports.  Then the same for a single
adapter of growing size, to see what memory it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import write_raw

Row = dict[str, Any]

MODULE = "benchmarks.bench_pull"
MEMORY_MBYTES = (8, 64, 256)
AHEAD = 8  # refs that are looked up while others are fetched


# ---------------------------------------------------------------------- the Hub


def serve(directory: Path, sizes: list[int]) -> None:
    """Serve `org/a-N` of those sizes, until standard input ends; prints the address."""
    from tests.hub.files import adapter_files
    from tests.hub.proxy import HubProxy
    from tests.hub.repos import HubRepos
    from tests.hub.server import OlahServer

    with OlahServer(directory) as server:
        repos = HubRepos(server.mirror)
        for number, nbytes in enumerate(sizes):
            repos.create(f"org/a-{number}", adapter_files(nbytes, seed=number))
        with HubProxy(server.url, mirror=server.mirror) as proxy:
            proxy.like_the_hub()
            print(proxy.url, flush=True)
            sys.stdin.read()


@contextmanager
def hub(sizes: list[int]) -> Iterator[str]:
    """The address of a Hub with adapters of those sizes, in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = ["--serve", directory, "--sizes", *map(str, sizes)]
        with subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            try:
                if not (address := server.stdout.readline().strip()):
                    raise SystemExit("the Hub did not start")
                yield address
            finally:
                server.stdin.close()
                server.wait(60)


# ---------------------------------------------------------------------- the ways to fetch


def one_by_one(refs: list[str], cache: Path, workers: int) -> Callable[[], None]:
    from huggingface_hub import snapshot_download

    from lora_cache.manifest import FILES

    def run() -> None:
        for ref in refs:
            snapshot_download(ref, cache_dir=cache, allow_patterns=list(FILES))

    return run


def pool(refs: list[str], cache: Path, workers: int) -> Callable[[], None]:
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import snapshot_download

    from lora_cache.manifest import FILES

    def fetch(ref: str) -> str:
        return str(snapshot_download(ref, cache_dir=cache, allow_patterns=list(FILES)))

    def run() -> None:
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(fetch, refs))

    return run


def pull(refs: list[str], cache: Path, workers: int) -> Callable[[], None]:
    import huggingface_hub.hf_api  # noqa: F401
    import requests  # noqa: F401  as the others, without the time of imports

    from lora_cache.adapter import AdapterRef
    from lora_cache.catalog import Catalog
    from lora_cache.sources import HubSource
    from lora_cache.store import DiskTier

    async def everything() -> None:
        disk = DiskTier(cache / "store", workers=workers)
        catalog = Catalog({"hub": HubSource(cache_dir=cache / "hub")}, disk)
        turns = asyncio.Semaphore(workers + AHEAD)

        async def one(ref: str) -> None:
            async with turns:
                await catalog.resolve(AdapterRef.parse(ref))

        try:
            await asyncio.gather(*map(one, refs))
        finally:
            await disk.close()

    return lambda: asyncio.run(everything())


METHODS = {"one by one": one_by_one, "pool": pool, "pull": pull}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(method: str, refs: list[str], workers: int) -> None:
    """Fetch in this process, and print what it took."""
    with tempfile.TemporaryDirectory() as directory:
        run = METHODS[method](refs, Path(directory), workers)
        before = peak_mib()
        began, used = time.perf_counter(), time.process_time()
        run()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - used
        weights = [path.resolve() for path in Path(directory).rglob("adapter_model.safetensors")]
        nbytes = sum(path.stat().st_size for path in weights)
        assert len(weights) == len(refs), f"{method}: {len(weights)} of {len(refs)} came"
        peak = {"before_mib": round(before, 1), "peak_mib": round(peak_mib(), 1)}
        print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "bytes": nbytes, **peak}))


def measure(method: str, endpoint: str, refs: list[str], workers: int) -> Row:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    arguments = ["--work", method, "--workers", str(workers), "--refs", *refs]
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


# ---------------------------------------------------------------------- the two questions


def throughput(mix: str, options: argparse.Namespace) -> list[Row]:
    adapters, mbytes = mix.split("x")
    rng = random.Random(options.seed)
    sizes = [int(float(mbytes) * 1e6 * rng.uniform(0.25, 1.75)) for _ in range(int(adapters))]
    runs: dict[str, list[Row]] = {method: [] for method in METHODS}
    with hub(sizes) as endpoint:
        refs = [f"org/a-{number}" for number in range(len(sizes))]
        for turn in range(options.turns + 1):  # the first one warms up and is not counted
            for method in METHODS:
                run = measure(method, endpoint, refs, options.workers)
                if turn:
                    runs[method].append(run)
    rows = []
    for method, taken in runs.items():
        seconds = [run["seconds"] for run in taken]
        rows.append(
            {
                "mix": mix,
                "method": method,
                "adapters": len(sizes),
                "bytes": taken[0]["bytes"],
                "workers": 1 if method == "one by one" else options.workers,
                "seconds": [round(value, 3) for value in seconds],
                "median_s": round(statistics.median(seconds), 3),
                "cpu_s": round(statistics.median(run["cpu_s"] for run in taken), 3),
                "peak_mib": max(run["peak_mib"] for run in taken),
            }
        )
    # Neighbours in time are compared: the machine may be busier in one turn than in another.
    for row in rows:
        ratios = [p / s for p, s in zip(rows[1]["seconds"], row["seconds"], strict=True)]
        row["throughput_to_pool"] = round(statistics.median(ratios), 3)
    return rows


def memory() -> list[Row]:
    rows = []
    with hub([mbytes * 1_000_000 for mbytes in MEMORY_MBYTES]) as endpoint:
        for number, mbytes in enumerate(MEMORY_MBYTES):
            for method in ("pool", "pull"):
                run = measure(method, endpoint, [f"org/a-{number}"], 4)
                rows.append({"method": method, "mbytes": mbytes, **run})
    return rows


def table_of(rows: list[Row]) -> Table:
    total = rows[0]["bytes"] / 1e6
    workers = rows[-1]["workers"]
    table = Table(title=f"{rows[0]['adapters']} adapters, {total:.0f} MB, {workers} workers")
    for column in ("method", "median s", "MB/s", "throughput to pool", "CPU s", "peak MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['median_s']:.2f}",
            f"{total / row['median_s']:.0f}",
            f"{row['throughput_to_pool']:.2f}",
            f"{row['cpu_s']:.2f}",
            f"{row['peak_mib']:.0f}",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--mix", action="append", help="adapters, and MB of the average one, as 50x4"
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="throughput only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--refs", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.sizes)
        return 0
    if options.work:
        work(options.work, options.refs, options.workers)
        return 0

    console = Console()
    rows = []
    for mix in options.mix or ["50x4", "12x60"]:
        mixed = throughput(mix, options)
        rows += mixed
        console.print(table_of(mixed))

    grown = [] if options.no_memory else memory()
    if grown:
        table = Table(title="one adapter: peak memory of the process, beyond its imports")
        for column in ("method", "MB", "MiB", "seconds"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in grown:
            growth = row["peak_mib"] - row["before_mib"]
            table.add_row(
                row["method"], f"{row['mbytes']}", f"{growth:.1f}", f"{row['seconds']:.2f}"
            )
        console.print(table)
    if options.json:
        packages = ("huggingface_hub", "requests", "urllib3")
        write_raw(options.json, MODULE, packages, seed=options.seed, rows=rows, memory=grown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
