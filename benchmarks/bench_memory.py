"""What does watching memory cost?  On this machine's host memory, and on its GPUs if it has any.

    python -m benchmarks.bench_memory [--seconds N] [--json FILE]

Two rows without a GPU, three with one:

* fake GPUs: the sampler with a fake NVML of eight GPUs with twenty processes each, host memory for
  real; samples as fast as they come, so the figure is CPU time per sample;
* host alone: the same without GPUs;
* this machine: the sampler's thread, as it runs beside a server (one sample a second), with the
  GPUs that are here.

`share` is of one core, at one sample a second.  It must stay below 0.001.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import write_raw
from lora_cache.memory import Gpus, Sampler
from lora_cache.testing import FakeGpu, FakeNvml

LIMIT = 0.001
Row = dict[str, Any]


def per_sample(what: str, gpus: Gpus | None, samples: int) -> Row:
    """CPU time of a sample, one taken right after the other."""
    sampler = Sampler(gpus)
    for _ in range(samples + 1):
        sampler.sample()
    cost = sampler.cost
    return _row(
        what, cost.samples, cost.cpu_s / cost.samples, cost.cpu_s / cost.samples, cost.setup_s
    )


def in_thread(seconds: float) -> Row:
    """The sampler as it is used."""
    with Sampler(Gpus()) as sampler:
        time.sleep(seconds)
        cost, latest = sampler.cost, sampler.latest
    gpus = latest.gpus if latest else None
    found = gpus.unknown or f"{len(gpus.gpus)} GPUs" if gpus else "nothing"
    cpu_s = cost.cpu_s / max(1, cost.samples)
    return _row(f"this machine ({found})", cost.samples, cpu_s, cost.share, cost.setup_s)


def _row(what: str, samples: int, cpu_s: float, share: float, setup_s: float) -> Row:
    return {
        "what": what,
        "samples": samples,
        "cpu_us": round(cpu_s * 1e6, 1),
        "share": round(share, 6),
        "setup_ms": round(setup_s * 1e3, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    options = parser.parse_args()

    fakes = [FakeGpu(f"GPU-{n}", processes=dict.fromkeys(range(20), 1 << 20)) for n in range(8)]
    rows = [
        per_sample("8 fake GPUs and host", Gpus(FakeNvml(*fakes), environ={}), options.samples),
        per_sample("host alone", None, options.samples),
        in_thread(options.seconds),
    ]
    table = Table(title=f"at most {LIMIT:.1%} of a core")
    for name in ("what", "samples", "CPU µs a sample", "of a core", "first sample ms"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        share = f"{row['share']:.4%}"
        table.add_row(
            row["what"], *map(str, (row["samples"], row["cpu_us"], share, row["setup_ms"]))
        )
    Console().print(table)
    if options.json:
        write_raw(options.json, "benchmarks.bench_memory", (), rows=rows, limit=LIMIT)
    return int(any(row["share"] >= LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
