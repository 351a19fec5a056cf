"""What a running vLLM holds in GPU memory, by its configuration: for ``status --memory``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from lora_cache.errors import LoraCacheError
from lora_cache.plan.model import describe_model
from lora_cache.plan.slots import SlotSettings, slot_cost

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claims:
    """On each of its GPUs, in bytes; None is unknown, and `unknown` says why.

    Attributes:
        gpus: how many share the model.
        slots: of all slots, filled or not; `bytes_per_slot` of one.
        weights: of the base model.
        kv_cache: of vLLM's KV cache.
        staging: room for one adapter on its way into a slot (resident engine).
        is_estimate: the weights are approximated.
    """

    gpus: int
    slots: int | None = None
    bytes_per_slot: int | None = None
    weights: int | None = None
    kv_cache: int | None = None
    staging: int = 0
    is_estimate: bool = False
    unknown: str | None = None


def claims_of(engine: Any) -> Claims | None:
    """Reckon it.  Never raises: this is only shown.

    Args:
        engine: one of ours; None is returned for those that have no vLLM.
    """
    config = getattr(engine, "vllm_config", None)
    if config is None:
        return None
    gpus = 1
    try:
        gpus = int(config.parallel_config.tensor_parallel_size)
        return _claims(config, gpus, is_resident=engine.capabilities.name == "resident")
    except LoraCacheError as error:
        return Claims(gpus, unknown=str(error))
    except Exception as error:  # a vLLM whose configuration has other names must serve all the same
        logger.debug("cannot reckon what vLLM holds", exc_info=True)
        return Claims(gpus, unknown=f"vLLM's configuration is not understood: {error!r}")


def _claims(config: Any, gpus: int, *, is_resident: bool) -> Claims:
    lora, model_config, cache = config.lora_config, config.model_config, config.cache_config
    values = model_config.hf_text_config.to_dict()
    values.setdefault("architectures", model_config.architectures)
    dtype = _name(model_config.dtype)
    model = describe_model(values, str(model_config.model), "the model's config", dtype=dtype)
    targets = getattr(lora, "target_modules", None)
    settings = SlotSettings(
        max_lora_rank=int(lora.max_lora_rank),
        tp=gpus,
        lora_dtype=_name(lora.lora_dtype),
        fully_sharded=bool(lora.fully_sharded_loras),
        target_modules=tuple(targets) if targets else None,
    )
    cost = slot_cost(model, settings)
    kv_cache = None
    blocks = getattr(cache, "num_gpu_blocks", None)
    if blocks and not model.shape.sliding:  # where layers differ, blocks are shared out otherwise
        tokens = int(blocks) * int(cache.block_size)
        kv_cache = tokens * model.kv_bytes_per_token(gpus, str(cache.cache_dtype))
    return Claims(
        gpus=gpus,
        slots=cost.nbytes(int(lora.max_loras)),
        bytes_per_slot=cost.bytes_per_slot,
        weights=model.weight_bytes(gpus),
        kv_cache=kv_cache,
        staging=cost.bytes_per_slot if is_resident else 0,
        is_estimate=model.is_estimate,
    )


def _name(dtype: Any) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
