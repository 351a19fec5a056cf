"""All that depends on vLLM's version: which were run, which of its names we need.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

MIXIN_MODULE = "vllm.v1.worker.lora_model_runner_mixin"

#: Minor versions of vLLM 0.x with which the resident engine was run: 0.26 on a GPU, 0.32 on CPUs.
#: The source of 0.33 was read, too, but what was only read stays off unless it is forced on.
RUN_MINORS = (26, 32)

_WORKER_NAMES = (
    "_apply_adapters",
    "_load_adapter",
    "add_adapter",
    "add_dummy_lora",
    "list_adapters",
    "pin_adapter",
    "remove_adapter",
    "remove_all_adapters",
    "set_active_adapters",
)
_MANAGER_NAMES = (
    "_add_adapter",
    "_create_merged_loras_inplace",
    "activate_adapter",
    "lora_slots",
    "remove_adapter",
    "set_adapter_mapping",
)


def never_run() -> str | None:
    """Why nobody knows whether the resident engine works with this vLLM; none if it does."""
    version = str(importlib.import_module("vllm.version").__version__)
    found = re.match(r"0\.(\d+)\.", version)
    if found and int(found[1]) in RUN_MINORS:
        return None
    run = " and ".join(f"0.{minor}" for minor in RUN_MINORS)
    return f"vLLM {version} is installed, and the resident engine was run with {run} only"


def missing_names(mixin: ModuleType) -> list[str]:
    """What we need of vLLM and do not find; ``mixin`` is the imported `MIXIN_MODULE`."""
    stock = getattr(mixin, "LRUCacheWorkerLoRAManager", None)
    runner = getattr(mixin, "LoRAModelRunnerMixin", None)
    needs: list[tuple[Any, tuple[str, ...]]] = [
        (runner, ("load_lora_model",)),
        (stock, _WORKER_NAMES),
        (getattr(stock, "_manager_cls", None), _MANAGER_NAMES),
    ]
    return [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, names in needs
        for name in names
        if not hasattr(owner, name)
    ]


def take_over(mixin: ModuleType) -> None:
    """Rebind vLLM's worker-side LoRA manager to ours.  Idempotent; never raises.

    Args:
        mixin: the imported `MIXIN_MODULE`.
    """
    if getattr(mixin, "lora_cache_resident", False):
        return
    missing = missing_names(mixin)
    if missing:
        logger.error("the resident engine stays off: this vLLM lacks %s", ", ".join(missing))
        return
    from lora_cache.engines.resident.worker import ResidentLoRAManager

    mixin.LRUCacheWorkerLoRAManager = ResidentLoRAManager  # type: ignore[attr-defined]
    load = mixin.LoRAModelRunnerMixin.load_lora_model

    @functools.wraps(load)
    def load_lora_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, *args, **kwargs)
        self.lora_manager.watch(self)
        return model

    mixin.LoRAModelRunnerMixin.load_lora_model = load_lora_model
    mixin.lora_cache_resident = True  # type: ignore[attr-defined]


def tensor_parallel() -> tuple[int, int]:
    """The rank of this worker, and how many there are."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def synchronising() -> AbstractContextManager[Any]:
    """Around work that may wait for the device; newer versions complain about it elsewhere."""
    try:
        sync_debug = importlib.import_module("vllm.utils.gpu_sync_debug")
    except ModuleNotFoundError:
        return nullcontext()
    allowed: AbstractContextManager[Any] = sync_debug.gpu_sync_allowed()
    return allowed
