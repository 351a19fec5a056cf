"""How fast does the simulator replay a trace through the real planner?

    python -m benchmarks.bench_policies [--policies lru,lfu] [--json FILE]

A million requests, Zipf(1.0) over 10,000 adapters, 64 slots, no leases held: about every second
request misses.  Each policy runs alone, on one core, all in: generating the trace, the planner,
the policy of both tiers, the reckoning of loads.

Beside them, in the same run and on the same requests: libcachesim, a cache simulator in C, with
its own LRU and with an LRU written in Python against its plugin interface.  They decide nothing
but who is evicted: no host tier, no leases, no transitions.  Misses must agree to the last one.

CPU seconds of this process, the best of `--repeats`, turn by turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libcachesim
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_raw
from lora_cache.policies import policy_names
from lora_cache.sim import Setup, open_trace, simulate
from lora_cache.sim.trace import Trace
from lora_cache.spec import split_specs

SLOTS = 64
Row = dict[str, Any]


def ours(trace: Trace, policy: str) -> float:
    """Miss ratio, by our simulator."""
    (row,) = simulate(trace, [policy], [SLOTS], Setup(belady=policy == "belady"))
    return row.miss_ratio


def generate(trace: Trace) -> float:
    """What making up the requests costs, which is a part of every row of ours."""
    for _ in trace:
        pass
    return 0.0


def write_trace(trace: Trace, path: Path) -> libcachesim.TraceReader:
    """The same requests as a file that libcachesim reads in C."""
    with path.open("w") as file:
        for number, request in enumerate(trace):
            file.write(f"{number},{int(request.adapter.removeprefix('a'))},1\n")
    layout = libcachesim.ReaderInitParam(
        has_header=False, has_header_set=True, obj_id_is_num=True, obj_id_is_num_set=True
    )
    layout.time_field, layout.obj_id_field, layout.obj_size_field = 1, 2, 3
    return libcachesim.TraceReader(str(path), libcachesim.TraceType.CSV_TRACE, layout)


def native_lru(reader: libcachesim.TraceReader) -> float:
    """Miss ratio, by libcachesim's own LRU."""
    reader.reset()
    missed, _ = libcachesim.LRU(SLOTS).process_trace(reader)
    return float(missed)


def plugin_lru(reader: libcachesim.TraceReader) -> float:
    """Miss ratio, by an LRU in Python that libcachesim calls."""

    def init(_: Any) -> OrderedDict[int, None]:
        return OrderedDict()

    def hit(order: OrderedDict[int, None], request: Any) -> None:
        order.move_to_end(request.obj_id)

    def miss(order: OrderedDict[int, None], request: Any) -> None:
        order[request.obj_id] = None

    def evict(order: OrderedDict[int, None], _: Any) -> int:
        return order.popitem(last=False)[0]

    def remove(order: OrderedDict[int, None], obj_id: int) -> None:
        order.pop(obj_id, None)

    def free(order: OrderedDict[int, None]) -> None:
        order.clear()

    reader.reset()
    cache = libcachesim.PluginCache(SLOTS, init, hit, miss, evict, remove, free)
    missed, _ = cache.process_trace(reader)
    return float(missed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--policies", default=",".join([*policy_names(), "belady"]))
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    options = parser.parse_args()

    spec = f"zipf:adapters={options.adapters},skew=1.0,requests={options.requests},seed=1"
    trace = open_trace(spec)
    with tempfile.TemporaryDirectory() as directory:
        reader = write_trace(trace, Path(directory) / "trace.csv")
        candidates: dict[str, Callable[[], float]] = {
            "libcachesim LRU (C)": lambda: native_lru(reader),
            "libcachesim plugin, LRU in Python": lambda: plugin_lru(reader),
            "generating the trace": lambda: generate(trace),
        }
        for policy in split_specs(options.policies):
            candidates[policy] = lambda policy=policy: ours(trace, policy)  # type: ignore[misc]
        rows: list[Row] = [{"what": what, "cpu_s": []} for what in candidates]
        for _ in range(options.repeats):
            for row, run in zip(rows, candidates.values(), strict=True):
                began = time.process_time()
                row["miss_ratio"] = round(run(), 6)
                row["cpu_s"].append(round(time.process_time() - began, 3))

    ratios = {row["what"]: row["miss_ratio"] for row in rows}
    lru = [ratio for what, ratio in ratios.items() if what == "lru" or "LRU" in what]
    assert max(lru) - min(lru) < 2e-6, f"the simulators do not agree: {ratios}"

    table = Table(title=f"{spec}, {SLOTS} slots")
    for name in ("what", "CPU s", "µs / request", "miss ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        best = min(row["cpu_s"])
        each = best / options.requests * 1e6
        missed = f"{row['miss_ratio']:.4f}" if row["miss_ratio"] else "–"
        table.add_row(row["what"], f"{best:.2f}", f"{each:.2f}", missed)
    Console().print(table)
    if options.json:
        write_raw(
            options.json,
            "benchmarks.bench_policies",
            ("libcachesim", "numpy"),
            trace=spec,
            slots=SLOTS,
            rows=rows,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
