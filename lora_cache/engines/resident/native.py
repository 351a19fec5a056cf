"""The slow path: vLLM's own loader, for adapters that the packer does not know.

Mixtures of experts, classification heads and whatever a later vLLM adds take this way.  It holds
the GIL for as long as vLLM does (BASELINE: a good part of a second for a large adapter), so it is
for exceptions; but it is vLLM's code to the last line, and it too writes any slot we choose.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from vllm.lora.model_manager import LoRAModelManager


def load_native(worker_manager: Any, request: Any) -> Any:
    """Read and merge an adapter as vLLM does, and register it nowhere.

    Args:
        worker_manager: a vLLM ``WorkerLoRAManager``.
        request: a ``LoRARequest`` with a local, absolute path.

    Returns:
        A vLLM ``LoRAModel`` in (page-locked) host memory, ready for `write_native`.

    Raises:
        Exception: whatever vLLM raises for an adapter that it refuses.
    """
    model = worker_manager._load_adapter(request)
    worker_manager._adapter_manager._create_merged_loras_inplace(model)
    return model


def write_native(adapter_manager: Any, slot: int, model: Any) -> None:
    """Fill a slot from a loaded adapter with vLLM's own `activate_adapter`.

    The manager's books stay as they are: a copy of it is made believe that this slot is the only
    free one and this adapter the only one registered.  On CUDA the copies are queued on the current
    stream; keep `model` until they are done.

    Raises:
        Exception: whatever vLLM raises; the slot then holds anything.
    """
    shadow = copy.copy(adapter_manager)
    shadow.lora_index_to_id = [
        None if index == slot else 0 for index in range(adapter_manager.lora_slots)
    ]
    shadow._active_adapters = {}
    shadow._registered_adapters = {model.id: model}
    with torch.inference_mode():
        LoRAModelManager.activate_adapter(shadow, model.id)
