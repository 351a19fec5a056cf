"""Real vLLM engines on the CPU, as few as possible: one in-process one, one `AsyncLLM`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lora_cache.engines import SWITCH
from tests.real.parts import write_adapter, write_tiny_llama

# In-process engines: a test can look into the slots, and they start in seconds.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# One thread: OpenMP threads that wait for each other by spinning are ruinous on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

MAX_LORAS, MAX_CPU_LORAS, MAX_RANK = 3, 7, 16

#: In-process engines share vLLM's process groups: the first one that is collected takes the others
#: with it.  So all of them live as long as the tests.
ALIVE: list[Any] = []

#: What tests share that takes as long to make as many of them take: one of pytest's processes
#: makes it, and runs all that use it.
ASYNC_LLM = pytest.mark.xdist_group("async_llm")
RESIDENT_ASYNC_LLM = pytest.mark.xdist_group("resident_async_llm")
TWO_WORKERS = pytest.mark.xdist_group("two_workers")
DEMO_MODEL = pytest.mark.xdist_group("demo_model")

TARGETS = [
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("down_proj",),
    ("gate_proj", "up_proj"),
    ("v_proj",),
]


def engine_arguments(model: Path, **changes: Any) -> dict[str, Any]:
    _inspect_models_here()
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 16 << 20,
        "enforce_eager": True,
        "max_model_len": 128,
        "enable_lora": True,
        "max_loras": MAX_LORAS,
        "max_cpu_loras": MAX_CPU_LORAS,
        "max_lora_rank": MAX_RANK,
        "dtype": "float32",
        "enable_prefix_caching": False,
        "max_num_seqs": 16,
        "disable_log_stats": True,
        **changes,
    }


def _inspect_models_here() -> None:
    """Where nobody did before, vLLM looks at each model's class in a new process.

    That is to keep CUDA out of this one.  It takes as long as importing vLLM, for each class.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve adapters, of different rank and target modules."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(
            root / f"a{number}",
            seed=number,
            rank=(4, 8, 16, 6)[number % 4],
            targets=TARGETS[number % len(TARGETS)],
        )
        for number in range(12)
    ]


@pytest.fixture(scope="session")
def llm(tiny_model: Path) -> Any:
    """One in-process `vllm.LLM` for all tests."""
    from vllm import LLM

    ALIVE.append(LLM(**engine_arguments(tiny_model)))
    return ALIVE[-1]


@contextmanager
def switched_on() -> Iterator[None]:
    """In-process engines that are made in here can be resident ones; all others stay vLLM's."""
    from lora_cache.engines.resident import compat

    mixin: Any = import_module(compat.MIXIN_MODULE)
    stock = mixin.LRUCacheWorkerLoRAManager
    load = mixin.LoRAModelRunnerMixin.load_lora_model
    compat.take_over(mixin)
    try:
        yield
    finally:
        mixin.LRUCacheWorkerLoRAManager = stock
        mixin.LoRAModelRunnerMixin.load_lora_model = load
        del mixin.lora_cache_resident


@pytest.fixture(scope="session")
def resident_llm(tiny_model: Path) -> Any:
    """One in-process `vllm.LLM` for the resident engine."""
    from vllm import LLM

    with switched_on():
        ALIVE.append(LLM(**engine_arguments(tiny_model, max_cpu_loras=MAX_CPU_LORAS - 1)))
    return ALIVE[-1]


@contextmanager
def start_async_llm(
    model: Path,
    *,
    resident: bool = False,
    environment: Mapping[str, str] | None = None,
    **changes: Any,
) -> Iterator[tuple[Any, asyncio.Runner]]:
    """An `AsyncLLM` (always a process of its own), and the loop it lives on.

    Args:
        resident: let its workers be taken over.
        environment: of its processes.
    """
    from vllm import AsyncEngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.async_llm import AsyncLLM

    # Once a process, and here while the switch is off: in-process engines stay vLLM's own, also
    # those that are made later.
    load_general_plugins()

    async def start() -> Any:
        arguments = engine_arguments(model, **changes)
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    with asyncio.Runner() as runner:
        # Only while it starts: caches that are told nothing look at it, too.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, "1" if resident else "0")
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            llm = runner.run(start())
        yield llm, runner
        llm.shutdown()


@pytest.fixture(scope="session")
def async_llm(tiny_model: Path) -> Iterator[tuple[Any, asyncio.Runner]]:
    """One `AsyncLLM` for all tests."""
    with start_async_llm(tiny_model) as started:
        yield started


@pytest.fixture(scope="session")
def resident_async_llm(tiny_model: Path) -> Iterator[tuple[Any, asyncio.Runner]]:
    """One `AsyncLLM` for the resident engine."""
    with start_async_llm(tiny_model, resident=True, max_cpu_loras=MAX_CPU_LORAS - 1) as started:
        yield started


@pytest.fixture(scope="session")
def two_workers(tiny_model: Path) -> Iterator[tuple[Any, asyncio.Runner]]:
    """One `AsyncLLM` for the resident engine, with two workers, which tell what they allocated."""
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = {
        "tensor_parallel_size": 2,
        "max_cpu_loras": 6,
        "worker_extension_cls": "tests.plan.allocated.WorkerThatTells",
    }
    with start_async_llm(
        tiny_model, resident=True, environment=environment, **arguments
    ) as started:
        yield started


class Inside:
    """What really happens inside an in-process engine: slots, host memory, reads from disk."""

    def __init__(self, llm: Any) -> None:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        self.worker = executor.driver_worker.worker.model_runner.lora_manager
        self.manager = self.worker._adapter_manager
        self.loads: list[int] = []
        self._load = self.worker._load_adapter

    def __enter__(self) -> Inside:
        def counted(request: Any) -> Any:
            self.loads.append(request.lora_int_id)
            return self._load(request)

        self.worker._load_adapter = counted
        return self

    def __exit__(self, *_: object) -> None:
        self.worker._load_adapter = self._load

    def slots(self) -> dict[int, int]:
        """Slot index → lora_int_id, read from the model's own table."""
        return {i: n for i, n in enumerate(self.manager.lora_index_to_id) if n is not None}

    def host(self) -> set[int]:
        return set(self.manager.list_adapters())
