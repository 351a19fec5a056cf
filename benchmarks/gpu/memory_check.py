"""Does `lora_cache.memory` see what happens on a real GPU, and at what cost?

    python3 -m benchmarks.gpu.memory_check --json OUT
    python3 -m benchmarks.gpu.memory_check --tiny        (CPU: only what happens under pressure)

Four questions:

* figures: what NVML says beside what CUDA says (total, reserved), and how both move when this
  process allocates a GiB on the GPU; is this process in the list of those that use it?
* page-locked memory: does the kernel count it (VmPin, VmLck, VmRSS, RssShmem) when PyTorch makes
  it (`cudaHostAlloc`), and when shared memory is registered (`cudaHostRegister`)?
* cost: the sampler's thread for `--seconds`, once a second, with the real driver; it must take less
  than a thousandth of a core.  And the CPU time of each call on its own.
* pressure: a second process takes the GPU's memory, and host memory is said to be full, under a
  server: is it noticed within a second, does what we hold shrink, does a request fail?
  (`pressure_check.py`, in a process of its own.)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import write_raw
from lora_cache.memory import Gpus, Host, Sampler

Row = dict[str, Any]
GIB = 1 << 30
LIMIT = 0.001


def reading(gpus: Gpus) -> Row:
    """The first visible GPU, by NVML and by CUDA."""
    import torch

    found = gpus.read()
    gpu = found.gpus[0]
    free, total = torch.cuda.mem_get_info(0)
    mine = next((p.used for p in gpu.processes or () if p.pid == os.getpid()), None)
    return {
        "nvml": {name: getattr(gpu, name) for name in ("total", "used", "free", "reserved")},
        "cuda": {"total": total, "free": free},
        "processes": None if gpu.processes is None else len(gpu.processes),
        "this_process": mine,
        "unknown": gpu.unknown,
        "note": found.note,
    }


def locked() -> Row:
    """What the kernel counts for this process."""
    found = Host().process()
    assert found is not None
    names = ("resident", "shared", "locked", "page_locked")
    return {name: getattr(found, name) for name in names}


def moved(before: Row, after: Row) -> Row:
    """By how much each figure has grown, in MiB."""
    return {name: round((after[name] - before[name]) / (1 << 20), 1) for name in before}


def page_locked() -> dict[str, Row]:
    """What moves when a GiB is page-locked, in each of two ways."""
    import torch

    found = {}
    before = locked()
    pinned = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    pinned.fill_(1)
    found["pin_memory"] = moved(before, locked())
    del pinned

    shared = mmap.mmap(-1, GIB)
    shared.write(b"\1" * GIB)
    before = locked()
    address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(address, GIB, 0)
    found["cudaHostRegister"] = moved(before, locked()) | {"status": int(status)}
    runtime.cudaHostUnregister(address)
    return found


def cpu_us(call: Callable[[], object], times: int = 200) -> float:
    """CPU time of one call, in microseconds."""
    call()
    began = time.thread_time()
    for _ in range(times):
        call()
    return round((time.thread_time() - began) / times * 1e6, 1)


def pressure(tiny: bool) -> Row:
    """What `pressure_check` finds."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu.pressure_check", "--json", str(found)]
        subprocess.run([*command, *(["--tiny"] if tiny else [])], check=False)
        if not found.exists():
            return {"faults": ["pressure_check ended without figures"]}
        row: Row = json.loads(found.read_text())
        return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    options = parser.parse_args()
    under_pressure = pressure(options.tiny)  # first: it needs the whole GPU
    if options.tiny:
        if options.json:
            write_raw(options.json, "benchmarks.gpu.memory_check", (), pressure=under_pressure)
        return bool(under_pressure["faults"])

    import torch

    if not torch.cuda.is_available():
        print("this needs a GPU", file=sys.stderr)
        return 2
    torch.zeros(1, device="cuda")
    gpus = Gpus()
    if unknown := gpus.read().unknown:
        print(unknown, file=sys.stderr)
        return 2
    before = reading(gpus)
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    after = reading(gpus)
    del held
    figures = {"before": before, "with_a_gib_more": after}
    kernel = page_locked()
    host = Host()
    costs = {
        "gpus, with processes": cpu_us(gpus.read),
        "gpus, without": cpu_us(lambda: gpus.read(processes=False)),
        "host": cpu_us(host.read),
        "process": cpu_us(host.process),
    }
    with Sampler(Gpus()) as sampler:
        time.sleep(options.seconds)
        cost = sampler.cost
    thread = {
        "samples": cost.samples,
        "share": round(cost.share, 6),
        "cpu_us": round(cost.cpu_s / max(1, cost.samples) * 1e6, 1),
        "setup_ms": round(cost.setup_s * 1e3, 2),
    }
    raw: Row = {"figures": figures, "page_locked_mib": kernel, "cpu_us": costs, "thread": thread}
    for name, value in raw.items():
        print(f"{name}: {value}")
    raw["pressure"] = under_pressure  # printed already
    if options.json:
        device = torch.cuda.get_device_name()
        packages = ("torch", "nvidia-ml-py")
        write_raw(options.json, "benchmarks.gpu.memory_check", packages, device=device, **raw)
    return int(cost.share >= LIMIT or bool(under_pressure["faults"]))


if __name__ == "__main__":
    sys.exit(main())
