"""Engines: the only code that knows vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_cache.engines.base import Capabilities, Engine, TransitionFailedError

__all__ = ["Capabilities", "Engine", "TransitionFailedError", "make_engine"]


#: Set to 1 before vLLM starts, it lets its workers be taken over by the resident engine; set to
#: `FORCE`, even those of a vLLM that the resident engine was never run with.
SWITCH = "LORA_CACHE_RESIDENT"
FORCE = "force"


def is_switched_on() -> bool:
    """Whether the environment asks for the resident engine."""
    return os.environ.get(SWITCH) in ("1", FORCE)


def make_engine(
    target: Any,
    kind: str = "auto",
    host_bytes: int | None = None,
    image_dir: Path | None = None,
    image_bytes: int = 0,
) -> Engine:
    """The engine for `target`: itself if it is one, else one around it.

    Args:
        target: an `Engine`, a `vllm.AsyncLLM` or a `vllm.LLM`.
        kind: ``"stock"``, ``"resident"``, or ``"auto"``: resident if `SWITCH` is set, else stock.
        host_bytes: what will be kept in host memory at most, for the resident engine.
        image_dir: where it keeps packed images on disk.
        image_bytes: how many bytes they may take there; 0: none are kept.

    Raises:
        ConfigError: `target` is none of these, or cannot be managed.
    """
    if hasattr(target, "apply") and hasattr(target, "holdings"):
        engine: Engine = target
        return engine
    if kind == "resident" or (kind == "auto" and is_switched_on()):
        from lora_cache.engines.resident.engine import ResidentEngine

        return ResidentEngine(target, host_bytes, image_dir, image_bytes)
    from lora_cache.engines.stock import StockEngine

    return StockEngine(target)
