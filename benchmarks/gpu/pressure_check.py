"""Memory grows scarce under a server with many adapters: is it noticed, and does anybody suffer?

    python3 -m benchmarks.gpu.pressure_check --json OUT          (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.pressure_check --tiny              (CPU, a minute)

Clients ask for random adapters all the time, through the resident engine.  Meanwhile

* a second process takes what is left of the GPU but 1.2 %: how long until the cache says so?  Are
  prefetches and pins refused until it is gone?  (``--tiny``: the GPU is a fake one.)
* host memory is said to be full: how fast does the arena shrink, what does the system get back, and
  does it all return afterwards?

It fails if a request does, if either is noticed later than within a second, or if nothing shrinks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import rig
from lora_cache.bench.servers import Managed, Row
from lora_cache.bench.vllm import sampling
from lora_cache.config import CacheConfig
from lora_cache.errors import MemoryPressureError
from lora_cache.events import BudgetEvent, Event
from lora_cache.level import Level
from lora_cache.memory import Gpus, Host, HostMemory, Marks, PressureEvent, Sampler
from lora_cache.memory.sampler import HOST
from lora_cache.testing import FakeGpu, FakeNvml

DWELL_S = 2.0
HOST_MARKS = Marks(dwell_s=DWELL_S)
GPU_MARKS = Marks(soft=0.98, hard=0.995, band=0.01, dwell_s=DWELL_S)
LEFT = 0.012  # of the GPU's memory, which is more than vLLM needs beside what it has

#: Takes the memory when it is told to, says when it had it, and holds it until it is killed.
HOG = f"""
import sys, time, torch
torch.zeros(1, device="cuda")
sys.stdin.readline()
free, total = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - int({LEFT} * total)), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print(time.monotonic(), held.numel(), flush=True)
sys.stdin.readline()
"""


class ToldHost(Host):
    """The real one, unless it is told to be full."""

    is_full = False

    def read(self) -> HostMemory | None:
        found = super().read()
        if found is None or self.is_full:
            return HostMemory(100, 1)
        return HostMemory(100, 50)  # what else runs on this machine is not the question


@dataclass
class Clients:
    """Requests for random adapters, one after the other, several at a time."""

    server: Managed
    adapters: int
    options: argparse.Namespace
    done: int = 0
    failures: list[str] = field(default_factory=list)
    stopping: bool = False

    async def go_on(self) -> int:
        """For some seconds, and until each client may have had an answer; how many there were."""
        before = self.done
        await asyncio.sleep(self.options.seconds)
        await until(lambda: self.done > before + self.options.clients or bool(self.failures), 300)
        return self.done - before

    async def run(self, number: int) -> None:
        rng = random.Random(number)
        params = sampling(self.options.tokens)
        while not self.stopping:
            words = rig.prompt(rng, self.options.prompt, self.options.tiny)
            try:
                async for _ in self.server.stream(words, params, rng.randrange(self.adapters)):
                    pass
                self.done += 1
            except Exception as error:
                self.failures.append(repr(error))


class Heard:
    """What the cache has said, and when."""

    def __init__(self, cache: Any) -> None:
        self.events: list[tuple[float, Event]] = []
        cache.subscribe(lambda event: self.events.append((time.monotonic(), event)))

    async def level(self, host: bool, level: Level, since: float) -> float:
        """When the cache has told that a resource came to `level`."""

        def found() -> float | None:
            for at, event in self.events:
                if at < since or not isinstance(event, PressureEvent):
                    continue
                if (event.resource == HOST) is host and event.after is level:
                    return at
            return None

        await until(lambda: found() is not None)
        return found() or 0.0


async def until(true: Callable[[], bool], limit_s: float = 60.0) -> float:
    """Wait; returns how long it took."""
    began = time.monotonic()
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def optional_work(server: Managed, clients: Clients) -> Row:
    """What becomes of a prefetch and of a pin."""
    tiers = await server.cache.prefetch(server.paths[: clients.adapters])
    try:
        await server.cache.pin(server.paths[0])
        await server.cache.unpin(server.paths[0])
        pin = "accepted"
    except MemoryPressureError as error:
        pin = str(error)
    counts = {tier: list(map(str, tiers.values())).count(tier) for tier in ("gpu", "host", "disk")}
    return {"prefetched_to": counts, "pin": pin}


@asynccontextmanager
async def second_process(fake: FakeGpu | None) -> AsyncIterator[tuple[float, int]]:
    """Most of the GPU's memory is gone; when, and how much."""
    if fake is not None:
        fake.processes[1] = taken = int(fake.total * (1 - LEFT)) - fake.reserved
        yield time.monotonic(), taken
        fake.processes.clear()
        return
    hog = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOG, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert hog.stdin is not None
    assert hog.stdout is not None
    try:
        hog.stdin.write(b"\n")
        at, taken_bytes = (await hog.stdout.readline()).split()
        yield float(at), int(taken_bytes)
    finally:
        hog.kill()
        await hog.wait()


async def on_the_gpu(server: Managed, clients: Clients, heard: Heard, fake: Any) -> Row:
    async with second_process(fake) as (at, taken):
        noticed = await heard.level(False, Level.SOFT, at - 1.0) - at
        during = await optional_work(server, clients)
        served = await clients.go_on()
    gone = time.monotonic()
    over = await heard.level(False, Level.NONE, gone) - gone
    return {
        "taken_bytes": taken,
        "noticed_s": round(noticed, 3),
        "over_s": round(over, 3),
        "during": during,
        "afterwards": await optional_work(server, clients),
        "served_meanwhile": served,
    }


async def on_the_host(server: Managed, clients: Clients, heard: Heard, host: ToldHost) -> Row:
    cache, engine = server.cache, server.cache._engine

    def held() -> Row:
        return {
            "arena_bytes": os.fstat(engine._arena.fd).st_blocks * 512,
            "allocated_bytes": engine._arena.used,
            "adapters": len(list(engine._images)),
        }

    await until(lambda: not engine._line.is_busy)
    before = held()
    host.is_full, at = True, time.monotonic()
    noticed = await heard.level(True, Level.HARD, at) - at
    slots = engine.capabilities.slots
    # A newcomer is packed before its victim leaves, so there are a few more under way.
    shrank = await until(lambda: held()["adapters"] <= 2 * slots)
    served = await clients.go_on()
    small, during = held(), await optional_work(server, clients)
    host.is_full, eased = False, time.monotonic()
    over = await heard.level(True, Level.NONE, eased) - eased
    afterwards = await optional_work(server, clients)
    await until(lambda: held()["adapters"] >= before["adapters"])
    budgets = [event.after for _, event in heard.events if isinstance(event, BudgetEvent)]
    return {
        "noticed_s": round(noticed, 3),
        "shrank_s": round(shrank, 3),
        "over_s": round(over, 3),
        "before": before,
        "small": small,
        "back": held(),
        "budgets": budgets,
        "during": during,
        "afterwards": afterwards,
        "served_meanwhile": served,
        "given_back": cache.stats().given_back,
    }


async def measure(options: argparse.Namespace, root: Path) -> Row:
    model, paths = rig.write_files(root, options.adapters, rank=options.rank, tiny=options.tiny)
    engine = rig.start_vllm(
        model,
        slots=options.slots,
        host=options.adapters,
        max_num_seqs=options.clients,
        rank=options.rank,
        tiny=options.tiny,
    )
    fake = FakeGpu("GPU-fake") if options.tiny else None
    host = ToldHost()
    sampler = Sampler(
        Gpus(FakeNvml(fake), environ={}) if fake else Gpus(),
        host,
        period_s=CacheConfig().memory_period_s,
        max_share=0.001,
        host_marks=HOST_MARKS,
        gpu_marks=GPU_MARKS,
    )
    settings: Row = {"sampler": sampler, "host_marks": HOST_MARKS}
    server = Managed(engine, paths, "resident", **settings)
    try:
        with sampler:
            await server.fill(range(options.adapters))
            heard, clients = Heard(server.cache), Clients(server, options.adapters, options)
            running = [asyncio.ensure_future(clients.run(n)) for n in range(options.clients)]
            await clients.go_on()
            found = {
                "gpu": await on_the_gpu(server, clients, heard, fake),
                "host": await on_the_host(server, clients, heard, host),
            }
            clients.stopping = True
            await asyncio.gather(*running)
            cost = sampler.cost
            await server.close()
    finally:
        engine.shutdown()
    return found | {
        "gpu_is_fake": fake is not None,
        "requests": clients.done,
        "failures": clients.failures,
        "sampler": {"share": round(cost.share, 6), "samples": cost.samples},
        "events": [f"{at:.3f} {event}" for at, event in heard.events][-200:],
    }


def faults(found: Row) -> list[str]:
    """What is not as it must be."""
    gpu, host = found["gpu"], found["host"]
    checks = {
        f"{len(found['failures'])} requests failed": not found["failures"],
        "the GPU's pressure was noticed late": gpu["noticed_s"] < 1.0,
        "the host's pressure was noticed late": host["noticed_s"] < 1.0,
        "the arena did not shrink": host["small"]["arena_bytes"]
        < 0.7 * host["before"]["arena_bytes"],
        "a pin was accepted under pressure": "accepted"
        not in (gpu["during"]["pin"], host["during"]["pin"]),
        "a pin was refused afterwards": gpu["afterwards"]["pin"]
        == host["afterwards"]["pin"]
        == "accepted",
        "nobody was served meanwhile": bool(gpu["served_meanwhile"] and host["served_meanwhile"]),
    }
    return [what for what, holds in checks.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--adapters", type=int, default=48, help="all fit into host memory")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rig.register_plugin(Path(directory))
        found = asyncio.run(measure(options, Path(directory)))
    wrong = faults(found)
    chosen = {name: value for name, value in vars(options).items() if name != "json"}
    if options.json:
        raw = rig.about() | {"options": chosen, "faults": wrong, **found}
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    for name in ("gpu", "host", "requests", "failures", "sampler"):
        print(f"{name}: {found[name]}", flush=True)
    print("\n".join(wrong) or "all as it must be", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
