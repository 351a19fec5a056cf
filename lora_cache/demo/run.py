"""What `lora-cache demo` does: start vLLM, ask the base model, then serve six adapters."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import IO, Any, Protocol

from lora_cache.adapter import AdapterLike
from lora_cache.cache import AsyncLoraCache
from lora_cache.demo.catalogue import ADAPTERS, PROMPTS, adapter_dir
from lora_cache.demo.model import prepare_model
from lora_cache.engines import SWITCH
from lora_cache.errors import EngineError, LoraCacheError, MissingExtraError
from lora_cache.lease import Lease
from lora_cache.policies import make_policy
from lora_cache.state import Tier
from lora_cache.views import Snapshot, Stats

MAX_LORAS, MAX_CPU_LORAS = 2, 4
_IN_FLIGHT = 3
_MAX_TOKENS = 32
_LOG_TAIL_LINES = 30

# vLLM reads these when it is imported.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# More threads help a model this small only while the machine is idle; when another process needs a
# core, they cost minutes: OpenMP's threads spin while they wait for each other.
_DEFAULTS = {"OMP_NUM_THREADS": "1"}


@dataclass(slots=True)
class Exchange:
    """One request: a prompt, the adapter that it goes to, and what has come back so far.

    Attributes:
        found: the tier that its adapter was found in; None while it waits for it.
    """

    number: int
    adapter: str
    prompt: str
    base_text: str
    text: str = ""
    found: Tier | None = None
    waited_s: float = 0.0
    finished: bool = False


@dataclass(slots=True)
class Progress:
    """Everything a view may show while the demo runs; the last one is the result."""

    policy: str
    requests: int
    vllm: str = ""
    exchanges: list[Exchange] = field(default_factory=list)  # in the order they were begun
    stats: Stats | None = None
    snapshot: Snapshot | None = None
    drift: int = 0
    startup_s: float = 0.0
    serving_s: float = 0.0

    def mean_wait_s(self, *found: Tier) -> float:
        """Mean seconds that requests waited for an adapter that was in one of these tiers."""
        waits = [e.waited_s for e in self.exchanges if e.found in found]
        return sum(waits) / len(waits) if waits else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The documented form of ``lora-cache demo --json``."""
        assert self.stats is not None, "the demo has not run"
        assert self.snapshot is not None, "the demo has not run"
        return {
            "engine": self.snapshot.engine,
            "vllm": self.vllm,
            "policy": self.policy,
            "max_loras": MAX_LORAS,
            "max_cpu_loras": MAX_CPU_LORAS,
            "requests": self.stats.requests,
            "slot_hits": self.stats.slot_hits,
            "host_hits": self.stats.host_hits,
            "disk_hits": self.stats.disk_hits,
            "evictions": self.stats.evictions,
            "disk_loads": self.stats.disk_loads,
            "activations": self.stats.activations,
            "drift": self.drift,
            "mean_wait_s": {tier.value: round(self.mean_wait_s(tier), 4) for tier in Tier},
            "seconds": round(self.startup_s + self.serving_s, 2),
            "startup_seconds": round(self.startup_s, 2),
            "answers": [
                {
                    "adapter": exchange.adapter,
                    "prompt": exchange.prompt,
                    "text": exchange.text,
                    "base_text": exchange.base_text,
                    "found_in": exchange.found,
                }
                for exchange in self.exchanges
            ],
        }


class View(Protocol):
    """Whoever shows the demo."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def update(self, progress: Progress) -> None:
        """Something has changed; called for every token."""

    def answered(self, exchange: Exchange, progress: Progress) -> None:
        """A request has ended."""


def run(view: View, *, requests: int, policy: str, seed: int, engine: str = "resident") -> Progress:
    """Run the demo.

    Args:
        engine: ``"resident"`` or ``"stock"``.

    Raises:
        MissingExtraError: vLLM or the demo's model is not installed.
        EngineError: vLLM did not start; the end of what it printed is on stderr.
    """
    make_policy(policy)  # a typing error is told now, not after half a minute
    if find_spec("vllm") is None:
        raise MissingExtraError(
            "the demo needs vLLM, which is not installed: pip install 'lora-cache[demo]'"
        )
    started = time.perf_counter()
    view.stage("starting vLLM on this machine's CPU (half a minute; the first time, a whole one)")
    llm, version = _start_engine(engine)
    view.stage(f"asking the base model {len(PROMPTS)} questions, for comparison")
    chat = {prompt: _chat(llm, prompt) for prompt in PROMPTS}
    base = _ask_base(llm, chat)
    progress = Progress(policy, requests, vllm=version)
    progress.exchanges = [
        Exchange(number, adapter, prompt, base[prompt])
        for number, (adapter, prompt) in enumerate(traffic(requests, seed), 1)
    ]
    progress.startup_s = time.perf_counter() - started
    view.stage(f"serving {requests} requests for {len(ADAPTERS)} adapters in {MAX_LORAS} slots")
    asyncio.run(_serve(llm, chat, progress, view, engine))
    return progress


def traffic(requests: int, seed: int) -> list[tuple[str, str]]:
    """Draw (adapter, prompt) pairs: two adapters at a time are popular, and fashion moves on.

    One of the last fashion lingers, the others are rare.  Every adapter has its time, so from six
    requests on each is asked at least once.
    """
    rng = random.Random(seed)
    names = rng.sample(list(ADAPTERS), len(ADAPTERS))
    drawn: list[str] = []
    for first in range(0, len(names), 2):
        hot, lingering = names[first : first + 2], names[first - 1]
        length = requests * (first + 2) // len(names) - len(drawn)
        weights = [8 if n in hot else 4 if n == lingering else 0.5 for n in names]
        drawn += [*hot, *rng.choices(names, weights, k=max(0, length - len(hot)))][:length]
    # Each adapter goes through the questions in an order of its own.
    questions = {name: rng.sample(PROMPTS, len(PROMPTS)) for name in names}
    return [
        (name, questions[name][drawn[:i].count(name) % len(PROMPTS)])
        for i, name in enumerate(drawn)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Send everything that is written to stdout and stderr to a file, also by C++ code.

    If the block fails, the end of that file is shown, unless the error says it all.
    """
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as log:
        try:
            _point_output_at([log.fileno(), log.fileno()])
            yield
        except Exception as error:
            _point_output_at(saved)
            if isinstance(error, EngineError) or not isinstance(error, LoraCacheError):
                _print_tail(log)
            raise
        finally:
            _point_output_at(saved)
            for fd in saved:
                os.close(fd)


def _point_output_at(fds: list[int]) -> None:
    for target, (fd, stream) in enumerate(zip(fds, (sys.stdout, sys.stderr), strict=True), 1):
        stream.flush()
        os.dup2(fd, target)


def _print_tail(log: IO[bytes]) -> None:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    print(*lines[-_LOG_TAIL_LINES:], sep="\n", file=sys.stderr)


def _start_engine(engine: str) -> tuple[Any, str]:
    os.environ.update(_ENVIRONMENT)
    os.environ[SWITCH] = "1" if engine == "resident" else "0"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # It overrules kv_cache_memory_bytes, and reserves gigabytes for what needs a few megabytes.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        model = prepare_model()
        import vllm

        llm = vllm.LLM(
            model=str(model),
            dtype="float32",  # twice as fast as bfloat16 on CPUs that have to emulate that
            max_model_len=512,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=True,
            enable_lora=True,
            max_loras=MAX_LORAS,
            max_cpu_loras=MAX_CPU_LORAS,
            max_lora_rank=16,
        )
    except LoraCacheError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM did not start: {error}") from error
    return llm, str(vllm.__version__)


def _chat(llm: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(
        llm.get_tokenizer().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    )


def _parameters() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)


def _ask_base(llm: Any, chat: dict[str, str]) -> dict[str, str]:
    # Before any adapter is there: vLLM's CPU kernels give wrong answers for the base model when
    # requests with and without an adapter share a batch.
    outputs = llm.generate(list(chat.values()), _parameters(), use_tqdm=False)
    return {
        prompt: output.outputs[0].text.strip() for prompt, output in zip(chat, outputs, strict=True)
    }


_lease: ContextVar[Lease] = ContextVar("_lease")


class _ObservedCache(AsyncLoraCache):
    """Lets each request see its lease: where the adapter was found, and how long it waited."""

    def lease(self, adapter: AdapterLike, *, timeout_s: float | None = None) -> Lease:
        lease = super().lease(adapter, timeout_s=timeout_s)
        _lease.set(lease)
        return lease


async def _serve(
    llm: Any, chat: dict[str, str], progress: Progress, view: View, engine: str
) -> None:
    started = time.perf_counter()
    async with _ObservedCache(llm, engine=engine, policy=progress.policy, publish=True) as cache:

        def look() -> None:
            progress.stats, progress.snapshot = cache.stats(), cache.snapshot()
            progress.serving_s = time.perf_counter() - started
            view.update(progress)

        async def ask(exchange: Exchange) -> None:
            stream = cache.generate(
                chat[exchange.prompt], _parameters(), adapter_dir(exchange.adapter)
            )
            async for output in stream:
                lease = _lease.get()
                exchange.found, exchange.waited_s = lease.served_from, lease.waited_s
                exchange.text = output.outputs[0].text.strip()
                look()
            exchange.finished = True
            look()
            view.answered(exchange, progress)

        async def work() -> None:
            for exchange in queue:
                await ask(exchange)

        look()
        queue = iter(progress.exchanges)  # shared: each worker takes the next one
        await asyncio.gather(*(work() for _ in range(_IN_FLIGHT)))
        progress.drift = await cache.reconcile()
        look()
