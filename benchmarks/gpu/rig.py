"""What the serving measurements share: vLLM behind `AsyncLLM`, ways to serve through it, streams.

One vLLM serves all rows of a measurement.  It is started with the resident engine switched on,
which changes nothing until a cache attaches: so plain vLLM, vLLM under our planner (the stock
engine) and the resident engine are measured on the same process, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]

FIRST_ID = 1 << 29  # of adapters that plain vLLM serves; the cache's lie above
_DRAIN_S = 40.0  # a row ends that long after its last arrival

_names = count()


def register_plugin(root: Path) -> None:
    """Let vLLM's processes find the entry point where the package is not installed."""
    if any(e.name == "lora_cache" for e in entry_points(group="vllm.general_plugins")):
        return
    info = root / "site" / "lora_cache-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-cache\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nlora_cache = lora_cache.engines.resident.plugin:register\n"
    )
    sys.path.append(str(info.parent))
    here = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, known, str(info.parent)]))


def _write(directory: Path, first: int, number: int, rank: int, tiny: bool) -> list[Path]:
    import torch

    from benchmarks.gpu.spike_scatter import files

    torch.set_num_threads(1)
    _, made = files(directory / f"part-{first:05d}", number, tiny, rank=rank, seed=first)
    return made


def write_files(
    root: Path, number: int, *, rank: int = 16, tiny: bool = False
) -> tuple[Path, list[Path]]:
    """A model, and adapters of distinct bytes for it, written by all cores."""
    from benchmarks.gpu.spike_scatter import files

    model, _ = files(root / "base", 0, tiny)
    each = max(1, min(8, number // (os.cpu_count() or 1)))
    firsts = range(0, number, each)
    with ProcessPoolExecutor() as pool:
        parts = [
            pool.submit(_write, root / "adapters", first, min(each, number - first), rank, tiny)
            for first in firsts
        ]
        return model, [path for part in parts for path in part.result()]


def start_vllm(
    model: Path, *, slots: int, host: int, max_num_seqs: int, rank: int = 16, tiny: bool = False
) -> Any:
    """An `AsyncLLM` with dummy weights, whose slots a cache may take over."""
    os.environ["LORA_CACHE_RESIDENT"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments: Row = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": max_num_seqs,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": host,
        "max_lora_rank": rank,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    if tiny:
        arguments |= {"enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    else:
        sizes = [n for n in (1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 96, 128) if n <= max_num_seqs]
        arguments |= {
            "dtype": "bfloat16",
            "kv_cache_memory_bytes": 16 << 30,
            "compilation_config": {"cudagraph_capture_sizes": sizes},
        }
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def prompt(rng: random.Random, length: int, tiny: bool) -> Any:
    return {"prompt_token_ids": rng.choices(range(2, 400 if tiny else 100_000), k=length)}


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


class Server(Protocol):
    """A way to serve adapters, by their numbers."""

    name: str

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]: ...

    async def empty(self) -> None:
        """No adapter is left in any tier above its files."""

    async def fill(self, adapters: Sequence[int]) -> None:
        """Bring adapters to host memory."""

    async def close(self) -> None: ...

    def report(self) -> Row:
        """Counters since `empty`."""


class Plain:
    """VLLM by itself."""

    name = "vllm"

    def __init__(self, engine: Any, paths: Sequence[Path]) -> None:
        from vllm.lora.request import LoRARequest

        self.engine = engine
        self.requests = [
            LoRARequest(lora_name=f"plain-{i}", lora_int_id=FIRST_ID + i, lora_path=str(path))
            for i, path in enumerate(paths)
        ]

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        found: AsyncIterator[Any] = self.engine.generate(
            prompt, params, f"plain-{next(_names)}", lora_request=self.requests[adapter]
        )
        return found

    async def empty(self) -> None:
        for lora_id in list(await self.engine.list_loras()):
            await self.engine.remove_lora(lora_id)

    async def fill(self, adapters: Sequence[int]) -> None:
        held = await self.engine.list_loras()
        for adapter in adapters:
            if self.requests[adapter].lora_int_id not in held:
                await self.engine.add_lora(self.requests[adapter])

    async def close(self) -> None:
        await self.empty()

    def report(self) -> Row:
        return {}


class Ideal(Plain):
    """As many adapters as slots, all of them resident: no loads at all."""

    name = "ideal"

    def __init__(self, engine: Any, paths: Sequence[Path], slots: int) -> None:
        super().__init__(engine, paths[:slots])
        self.slots = slots

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        return super().stream(prompt, params, adapter % self.slots)

    async def fill(self, adapters: Sequence[int]) -> None:
        await super().fill(range(self.slots))


class Managed:
    """VLLM under a cache.

    Args:
        kind: of engine.
        settings: of the cache.
    """

    def __init__(self, engine: Any, paths: Sequence[Path], kind: str, **settings: Any) -> None:
        self.name, self.kind, self.engine, self.paths = kind, kind, engine, paths
        self.settings = settings
        self.images = Path(tempfile.mkdtemp(prefix="images-"))
        self.cache: Any = None

    async def open(self) -> None:
        from lora_cache import AsyncLoraCache

        if self.cache is None:
            settings = {"engine": self.kind, "publish": False, **self.settings}
            if self.kind == "resident":
                settings["image_dir"] = self.images
            self.cache = await AsyncLoraCache(self.engine, **settings).__aenter__()

    def stream(self, prompt: Any, params: Any, adapter: int) -> AsyncIterator[Any]:
        found: AsyncIterator[Any] = self.cache.generate(prompt, params, self.paths[adapter])
        return found

    async def empty(self) -> None:
        await self.close()
        shutil.rmtree(self.images, ignore_errors=True)
        self.images.mkdir(mode=0o700)
        await self.open()

    async def fill(self, adapters: Sequence[int]) -> None:
        await self.open()
        await self.cache.prefetch([self.paths[a] for a in adapters], tier="host")

    async def close(self) -> None:
        if self.cache is not None:
            await self.cache.close()
            self.cache = None

    def report(self) -> Row:
        stats = self.cache.stats()
        return {
            name: getattr(stats, name)
            for name in ("slot_hits", "host_hits", "disk_hits", "activations", "load_failures")
        } | {"load_mean_ms": round(1e3 * stats.load_s / max(1, stats.activations), 2)}


@dataclass
class Answer:
    """When the tokens of one request came, in seconds of one clock."""

    adapter: int
    due: float
    tokens: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def first_token_s(self) -> float:
        return self.tokens[0] - self.due if self.tokens else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.tokens)]


async def ask(server: Server, answer: Answer, prompt: Any, params: Any) -> Answer:
    """Serve one request, and note when its tokens come."""
    async for output in server.stream(prompt, params, answer.adapter):
        now = time.perf_counter()
        answer.tokens += [now] * len(output.outputs[0].token_ids)
    answer.done = True
    return answer


async def replay(
    server: Server,
    arrivals: Sequence[tuple[float, int]],
    prompts: Sequence[Any],
    params: Sequence[Any],
) -> tuple[list[Answer], float]:
    """Send requests when they are due; returns the answers, and the seconds that it all took."""
    began = time.perf_counter()
    tasks: list[asyncio.Task[Answer]] = []
    answers: list[Answer] = []
    for (at, adapter), words, how in zip(arrivals, prompts, params, strict=True):
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        answers.append(Answer(adapter, began + at))
        tasks.append(asyncio.create_task(ask(server, answers[-1], words, how)))
    _, late = await asyncio.wait(tasks, timeout=_DRAIN_S)
    for task in late:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    last = max((answer.tokens[-1] for answer in answers if answer.tokens), default=began)
    return answers, last - began


def poisson(
    rng: random.Random, rate: float, seconds: float, adapters: int, zipf: float = 1.0
) -> list[tuple[float, int]]:
    """(seconds, adapter) of arrivals; which adapters are popular depends on `rng`."""
    order = list(range(adapters))
    rng.shuffle(order)
    weights = [(rank + 1) ** -zipf for rank in range(adapters)]
    found, at = [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append((at, rng.choices(order, weights)[0]))
    return found


def quantile(numbers: Sequence[float], share: float) -> float:
    """The smallest that at least `share` of them do not exceed."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def summary(answers: Sequence[Answer], seconds: float) -> Row:
    """Times in milliseconds."""
    first = [answer.first_token_s for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    done = sum(answer.done for answer in answers)

    def ms(number: float) -> float | None:
        return round(number * 1e3, 1) if number < float("inf") else None  # never came

    return {
        "requests": len(answers),
        "done": done,
        "adapters": len({answer.adapter for answer in answers}),
        "ttft_p50_ms": ms(quantile(first, 0.5)),
        "ttft_p99_ms": ms(quantile(first, 0.99)),
        "gap_p50_ms": ms(quantile(gaps, 0.5)),
        "gap_p99_ms": ms(quantile(gaps, 0.99)),
        "gap_p999_ms": ms(quantile(gaps, 0.999)),
        "gap_max_ms": ms(max(gaps, default=0.0)),
        "requests_per_s": round(done / seconds, 3) if seconds else 0.0,
    }


def about() -> Row:
    """The machine and the versions."""
    import torch
    import vllm

    return {
        "command": " ".join(["python3 -m", _module(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
