"""Reads a worker's `Layout` off vLLM's LoRA manager.  Runs in the worker, once, at start."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import vllm
from vllm.lora.peft_helper import PEFTHelper

from lora_cache.engines.resident.layout import ITEM_BYTES, Layout, Piece
from lora_cache.engines.resident.names import Renames
from lora_cache.engines.resident.probing import UnknownLayerError, probe, signature


def describe(adapter_manager: Any) -> Layout:
    """What this worker's slots look like.

    Takes some tens of milliseconds per kind of layer, and CPU memory of four int64 copies of the
    largest slot tensor.

    Args:
        adapter_manager: a vLLM ``LoRAModelManager``, which is not changed.
    """
    config = adapter_manager.lora_config
    renames, refusal = _renames(adapter_manager.model)
    dtype = str(config.lora_dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        refusal = f"slots of {dtype}"
    if getattr(adapter_manager, "is_pooling_model", False):
        refusal = "pooling models name their modules in two ways"
    if getattr(adapter_manager, "supports_mm", False) and hasattr(
        adapter_manager,
        "_get_text_lora_names",  # since 0.33
    ):
        refusal = "adapters of the bare language model name its modules in another way"
    sources: list[str] = []
    pieces: list[Piece] = []
    slow: list[str] = []
    resets: list[str] = []
    known: dict[tuple[Any, ...], list[Piece] | None] = {}
    for name, layer in adapter_manager.modules.items():
        members = adapter_manager.packed_modules.get(name, [name])
        key = signature(layer, len(members))
        if key not in known:
            known[key] = _probe(layer, len(members), adapter_manager.lora_slots, config)
        found = known[key]
        if found is None:
            slow += dict.fromkeys([name, *(m for m in members if not m.startswith(f"{name}."))])
            resets.append(name)
            continue
        first = len(sources)
        sources += members
        pieces += [
            msgspec.structs.replace(piece, module=name, source=first + piece.source)
            for piece in found
        ]
    ranks = _tensor_parallel(adapter_manager)
    return Layout(
        vllm_version=str(vllm.__version__),
        dtype=dtype,
        tp_rank=ranks[0],
        tp_size=ranks[1],
        fully_sharded=bool(config.fully_sharded_loras),
        max_rank=int(config.max_lora_rank),
        vocab_size=int(adapter_manager.vocab_size),
        honours_patterns=hasattr(PEFTHelper, "get_rank_and_scaling"),
        sources=tuple(sources),
        pieces=tuple(pieces),
        slow=tuple(slow),
        resets=tuple(resets),
        expected=_expected(adapter_manager),
        skip_prefixes=tuple(getattr(adapter_manager.model, "lora_skip_prefixes", None) or ()),
        renames=renames,
        refusal=refusal,
    )


def _probe(layer: Any, source_count: int, slots: int, config: Any) -> list[Piece] | None:
    try:
        return probe(layer, source_count, slots, int(config.max_lora_rank), config.lora_dtype)
    except UnknownLayerError:
        return None


def _tensor_parallel(adapter_manager: Any) -> tuple[int, int]:
    """(rank, size), from the layers themselves: those that are not sharded say (0, 1)."""
    found = [
        (int(layer.tp_rank), int(layer.tp_size))
        for layer in adapter_manager.modules.values()
        if hasattr(layer, "tp_size") and hasattr(layer, "tp_rank")
    ]
    return max(found, key=lambda pair: pair[1], default=(0, 1))


def _expected(adapter_manager: Any) -> tuple[str, ...]:
    """What ``WorkerLoRAManager._load_adapter`` calls the expected modules."""
    packed = adapter_manager.packed_modules_mapping
    found: set[str] = set()
    for module in adapter_manager.supported_lora_modules:
        found.update(packed.get(module, [module]))
    return tuple(sorted(name for name in found if "." not in name))


def _renames(model: Any) -> tuple[Renames, str | None]:
    """The model's renames, and why they cannot be exported (or None)."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return Renames(), None
    # As vLLM itself does before it reads an adapter's names; 0.26 has it by another name.
    for renaming_only in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, renaming_only):
            mapper = getattr(mapper, renaming_only)()
            break
    rules: dict[str, tuple[tuple[str, str], ...]] = {}
    for field in ("regex", "substr", "prefix", "suffix"):
        given = getattr(mapper, f"orig_to_new_{field}", None) or {}
        if any(not isinstance(to, str) for to in given.values()):
            return Renames(), "it drops or computes module names"
        rules[field] = tuple((getattr(old, "pattern", old), new) for old, new in given.items())
    for field in ("renaming", "stacked"):
        if getattr(mapper, f"orig_to_new_{field}", None):
            return Renames(), "it renames modules by more than texts"
    try:
        for pattern, template in rules["regex"]:
            re.sub(pattern, template, "")
    except re.error as error:
        return Renames(), f"a pattern of its renames is not Python's: {error}"
    found = Renames(rules["regex"], rules["substr"], rules["prefix"], rules["suffix"])
    return found, None
