"""What page-locking costs while steps run, and how fast an image can get into a slot.

    python3 -m benchmarks.gpu.spike_arena --json OUT      (GPU; a minute; needs no vLLM)

Slots of Llama-3.1-8B's shapes; steps are replays of one CUDA graph that reads some gigabytes of
weights.  Rows: the floor (one copy from page-locked memory, and one scatter); `_foreach_copy_`
against our kernel, for ranks at and below the slot's; page-locking and releasing blocks of shared
memory, untouched and touched, beside running steps; reading a file of an image's size into
page-locked memory by threads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_cache.engines.resident.scatter import Place, Scatter

HIDDEN, MLP, KV, LAYERS = 4096, 14336, 1024, 32
PROJECTIONS = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KV),
    (HIDDEN, KV),
    (HIDDEN, HIDDEN),
    (HIDDEN, MLP),
    (HIDDEN, MLP),
    (MLP, HIDDEN),
]
BLOCK = 256 << 20


def timed(*work: Callable[[], Any], times: int = 20) -> dict[str, float]:
    found = []
    for _ in range(times + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for part in work:
            part()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) * 1e3)
    found = sorted(found[3:])
    return {"median_ms": round(statistics.median(found), 3), "max_ms": round(found[-1], 3)}


class Slots:
    def __init__(self, slots: int, rank: int) -> None:
        self.tensors = []
        for _ in range(LAYERS):
            for fan_in, fan_out in PROJECTIONS:
                for shape in ((rank, fan_in), (fan_out, rank)):
                    self.tensors.append(
                        torch.zeros(slots, 1, *shape, dtype=torch.bfloat16, device="cuda")
                    )
        self.rank = rank

    def pieces(self, rank: int) -> tuple[list[tuple[int, int, int]], int]:
        found, offset = [], 0
        for number, tensor in enumerate(self.tensors):
            rows, columns = tensor.shape[-2:]
            rows, columns = (rank, columns) if number % 2 == 0 else (rows, rank)
            found.append((rows, columns, offset))
            offset += -(-rows * columns // 32) * 32
        return found, offset


def by_foreach(
    slots: Slots, pieces: list[tuple[int, int, int]], staging: Any, targets: list[Any], clear: bool
) -> None:
    """What PyTorch has for it."""
    sources = [staging[o : o + r * c].view(r, c) for r, c, o in pieces]
    if clear:
        torch._foreach_zero_([t[1] for t in slots.tensors])
    torch._foreach_copy_(targets, sources, non_blocking=True)


def scatter_rows(report: dict[str, Any]) -> None:
    for slot_rank, rank in ((16, 16), (16, 8), (64, 16), (64, 64)):
        slots = Slots(3, slot_rank)
        pieces, numbers = slots.pieces(rank)
        host = torch.randn(numbers, dtype=torch.float32).to(torch.bfloat16).pin_memory()
        staging = torch.empty_like(host, device="cuda")
        ours = Scatter(slots.tensors)
        table = ours.table(Place(n, *piece) for n, piece in enumerate(pieces))
        targets = [t[1, 0, :r, :c] for t, (r, c, _) in zip(slots.tensors, pieces, strict=True)]
        copy = partial(staging.copy_, host, non_blocking=True)
        foreach = partial(by_foreach, slots, pieces, staging, targets, slots.rank != rank)
        kernel = partial(ours.write, 2, staging.view(torch.uint8), table)
        for tensor in slots.tensors:
            tensor.fill_(7)
        copy()
        foreach()
        kernel()
        torch.cuda.synchronize()
        equal = all(torch.equal(t[1], t[2]) for t in slots.tensors)
        report[f"rank {rank} in {slot_rank}"] = row = {
            "image_bytes": numbers * 2,
            "equal": equal,
            "untouched": all(bool((t[0] == 7).all()) for t in slots.tensors),
            "copy": timed(copy),
            "copy+foreach": timed(copy, foreach),
            "copy+kernel": timed(copy, kernel),
            "foreach": timed(foreach),
            "kernel": timed(kernel),
        }
        print(slot_rank, rank, json.dumps(row), flush=True)


def steps(report: dict[str, Any]) -> None:
    """Page-lock blocks beside steps."""
    weights = [torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
    x = torch.randn(32, 8192, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def work() -> None:
        for _ in range(12):
            for weight in weights:
                torch.mm(x, weight)

    work()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    small = torch.zeros(64, device="cuda")
    cudart = torch.cuda.cudart()

    def run(name: str, beside: Callable[[], dict[str, list[float]]] | None) -> None:
        found: list[float] = []
        result: dict[str, list[float]] = {}
        thread = threading.Thread(target=lambda: result.update(beside() if beside else {}))
        thread.start()
        until = time.perf_counter() + 2.0
        while thread.is_alive() or time.perf_counter() < until:
            began = time.perf_counter()
            graph.replay()
            for _ in range(20):  # what a step launches besides its graph
                small.add_(1)
            torch.cuda.current_stream().synchronize()
            found.append((time.perf_counter() - began) * 1e3)
            if len(found) > 20000:
                break
        thread.join()
        found.sort()
        row: dict[str, Any] = {
            "steps": len(found),
            "step_median_ms": round(statistics.median(found), 3),
            "step_p99_ms": round(found[int(len(found) * 0.99)], 3),
            "step_max_ms": round(found[-1], 3),
        }
        for what, seconds in result.items():
            row[what + "_ms"] = {
                "median": round(statistics.median(seconds) * 1e3, 2),
                "max": round(max(seconds) * 1e3, 2),
            }
        report[name] = row
        print(name, json.dumps(row), flush=True)

    def lock(touched: bool, block: int, count: int) -> Callable[[], dict[str, list[float]]]:
        def beside() -> dict[str, list[float]]:
            descriptor = os.memfd_create("spike")
            os.ftruncate(descriptor, block * count)
            arena = mmap.mmap(descriptor, block * count)
            if touched:
                view = torch.frombuffer(arena, dtype=torch.uint8)
                view.zero_()
            base = torch.frombuffer(arena, dtype=torch.uint8).data_ptr()
            locks, unlocks = [], []
            for number in range(count):
                began = time.perf_counter()
                status = cudart.cudaHostRegister(base + number * block, block, 1)
                assert int(status) == 0, status
                locks.append(time.perf_counter() - began)
            for number in range(count):
                began = time.perf_counter()
                cudart.cudaHostUnregister(base + number * block)
                unlocks.append(time.perf_counter() - began)
            os.close(descriptor)
            return {"lock": locks, "unlock": unlocks}

        return beside

    run("undisturbed", None)
    run("undisturbed again", None)
    run("lock 16 untouched blocks of 256 MiB", lock(False, BLOCK, 16))
    run("lock 16 touched blocks of 256 MiB", lock(True, BLOCK, 16))
    run("lock 64 touched blocks of 32 MiB", lock(True, 32 << 20, 64))
    run("lock one touched block of 8 GiB", lock(True, 8 << 30, 1))


def reading(report: dict[str, Any], root: Path) -> None:
    nbytes = 92_356_608
    path = root / "image"
    path.write_bytes(os.urandom(nbytes))
    target = torch.empty(nbytes, dtype=torch.uint8).pin_memory()
    view = memoryview(target.numpy())
    descriptor = os.open(path, os.O_RDONLY)

    def read(threads: int, chunk: int, digest: Callable[[Any], Any] | None) -> None:
        def part(start: int) -> None:
            piece = view[start : start + chunk]
            os.preadv(descriptor, [piece], start)
            if digest:
                digest(piece)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(0, nbytes, chunk)))

    digests: dict[str, Any] = {"none": None, "sha256": lambda b: hashlib.sha256(b).digest()}
    with contextlib.suppress(ImportError):
        digests["xxh3"] = importlib.import_module("xxhash").xxh3_64_digest
    for name, digest in digests.items():
        for threads in (1, 2, 4, 8):
            row = timed(partial(read, threads, 4 << 20, digest), times=5)
            report[f"read, {threads} threads, digest {name}"] = row
            print(f"read, {threads} threads, digest {name}", row, flush=True)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only-scatter", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python3 -m benchmarks.gpu.spike_arena", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "scatter": {},
        "page_locking": {},
        "reading": {},
    }
    try:
        scatter_rows(report["scatter"])
        if options.only_scatter:
            return
        steps(report["page_locking"])
        with tempfile.TemporaryDirectory() as root:
            reading(report["reading"], Path(root))
    finally:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
