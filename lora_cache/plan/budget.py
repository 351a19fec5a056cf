"""Where the memory of a GPU goes: weights, slots, room to work, and the KV cache gets the rest.

vLLM takes ``gpu_memory_utilization`` of the GPU's memory, measures what weights (slots included)
and a trial run of the largest batch take of that, and makes the rest its KV cache
(``vllm/v1/worker/gpu_worker.py``, ``determine_available_memory``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_cache.errors import ConfigError
from lora_cache.plan.model import ITEM_BYTES, Model
from lora_cache.plan.slots import SlotCost, SlotSettings, slot_cost

MIB, GIB = 1 << 20, 1 << 30

#: Outside vLLM's share: the CUDA context of the worker, some 0.5 GiB on an H100.
CONTEXT_BYTES = 640 * MIB
#: More than this is not recommended: memory fragments, and other programs look at the GPU too.
MOST_UTILIZATION = 0.95

_BLOCK_TOKENS = 16  # of vLLM's KV cache
_GRAPHS_BYTES = 1 * GIB  # CUDA graphs, kernels and their workspaces
_COLLECTIVES_BYTES = 512 * MIB  # NCCL and its buffers, where there are several GPUs


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The other settings of vLLM that decide where memory goes.

    Attributes:
        max_model_len: longest context to be served.
        max_num_seqs, max_num_batched_tokens: size of a batch.
        kv_cache_dtype: as for vLLM.
        gpu_memory_utilization: as for vLLM; None: as much as is sensible.
        working_bytes: what the trial run takes, where it is known; None: an estimate.
        resident: with the resident engine, which keeps room for one adapter beside the slots.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float | None = None
    working_bytes: int | None = None
    resident: bool = False

    def __post_init__(self) -> None:
        counts = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        given = self.gpu_memory_utilization
        if given is not None and not 0 < given <= 1:
            raise ConfigError(f"gpu_memory_utilization is {given}: it is a share, 0.9 for instance")


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory of one GPU, in bytes.

    Attributes:
        gpu_bytes: all of it.
        utilization: vLLM's share.
        weight_bytes: of the base model.
        working_bytes: what the trial run takes on top; see `EngineSettings`.
        slots: what a slot costs.
        staging_bytes: room for an adapter on its way into a slot.
        kv_bytes_per_token: in all layers.
    """

    gpu_bytes: int
    utilization: float
    weight_bytes: int
    working_bytes: int
    slots: SlotCost
    staging_bytes: int
    kv_bytes_per_token: int

    @property
    def vllm_bytes(self) -> int:
        """What vLLM takes of it."""
        return math.floor(self.gpu_bytes * self.utilization)

    def kv_bytes(self, max_loras: int) -> int:
        """What is left for the KV cache, in whole blocks of 16 tokens; 0 if nothing is."""
        used = self.weight_bytes + self.working_bytes + self.staging_bytes
        used += self.slots.nbytes(max_loras)
        block = _BLOCK_TOKENS * self.kv_bytes_per_token
        return max(0, self.vllm_bytes - used) // block * block

    def kv_tokens(self, max_loras: int) -> int:
        """The same in tokens."""
        return self.kv_bytes(max_loras) // self.kv_bytes_per_token


def make_budget(
    model: Model, slots: SlotSettings, engine: EngineSettings, gpu_bytes: int
) -> Budget:
    """Reckon it.

    Raises:
        ConfigError: vLLM would refuse these settings for this model.
    """
    cost = slot_cost(
        model, slots, batched_tokens=engine.max_num_batched_tokens, seqs=engine.max_num_seqs
    )
    working = engine.working_bytes
    if working is None:
        working = working_estimate(model, slots.tp, engine)
    return Budget(
        gpu_bytes=gpu_bytes,
        utilization=engine.gpu_memory_utilization or _utilization(gpu_bytes),
        weight_bytes=model.weight_bytes(slots.tp),
        working_bytes=working,
        slots=cost,
        staging_bytes=cost.bytes_per_slot if engine.resident else 0,
        kv_bytes_per_token=model.kv_bytes_per_token(slots.tp, engine.kv_cache_dtype),
    )


def working_estimate(model: Model, tp: int, engine: EngineSettings) -> int:
    """What the largest batch takes beside weights: an estimate.

    The larger of two peaks: inside an MLP (input and output of the residual stream, twice; gate and
    up, and their product), and in sampling (logits, their sorted copy with indices, and
    probabilities: 24 bytes an entry).  CUDA graphs and libraries come on top.
    """
    shape, item = model.shape, ITEM_BYTES[model.dtype]
    token = (4 * shape.hidden + 3 * -(-shape.inner // tp)) * item
    vocab = next(layer.inputs for layer in model.layers if layer.name == "embed_tokens")
    peak = max(engine.max_num_batched_tokens * token, engine.max_num_seqs * vocab * 24)
    return peak + _GRAPHS_BYTES + (_COLLECTIVES_BYTES if tp > 1 else 0)


def _utilization(gpu_bytes: int) -> float:
    """As many whole percent as leave room for the CUDA context."""
    percent = max(0, gpu_bytes - CONTEXT_BYTES) * 100 // gpu_bytes if gpu_bytes > 0 else 0
    if percent < 1:
        raise ConfigError(f"a GPU of {gpu_bytes / GIB:.1f} GiB has no room for vLLM")
    return min(MOST_UTILIZATION, percent / 100)
