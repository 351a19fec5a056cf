"""Engines: the only code that knows vLLM."""

from __future__ import annotations

from typing import Any

from lora_cache.engines.base import Capabilities, Engine, TransitionFailedError

__all__ = ["Capabilities", "Engine", "TransitionFailedError", "make_engine"]


def make_engine(target: Any) -> Engine:
    """The engine for `target`: itself if it is one, else the stock engine around it.

    Args:
        target: an `Engine`, a `vllm.AsyncLLM` or a `vllm.LLM`.

    Raises:
        ConfigError: `target` is none of these, or cannot be managed.
    """
    if hasattr(target, "apply") and hasattr(target, "holdings"):
        engine: Engine = target
        return engine
    from lora_cache.engines.stock import StockEngine

    return StockEngine(target)
