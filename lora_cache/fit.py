"""Does an adapter fit an engine?  Found out before anything is set in motion for it."""

from __future__ import annotations

from lora_cache.adapter import Adapter
from lora_cache.engines import Capabilities
from lora_cache.errors import UnsupportedAdapterError


def check_fit(engine: Capabilities, adapter: Adapter) -> None:
    """Refuse what `engine` cannot serve.

    Raises:
        UnsupportedAdapterError: its rank is too high, or it was trained for a model of other
            widths; says which.
    """
    rank, limit = adapter.manifest.rank, engine.max_rank
    if rank > limit:
        raise UnsupportedAdapterError(
            f"{adapter.path} has rank {rank} and the engine serves up to {limit}: start vLLM "
            f"with max_lora_rank={rank} or more",
            key=adapter.key,
        )
    for module, *widths in adapter.manifest.widths:
        expected = engine.widths.get(module)
        if expected is not None and expected != tuple(widths):
            raise UnsupportedAdapterError(
                f"{adapter.path} does not fit this base model: its {module} is "
                f"{widths[0]} → {widths[1]}, the model's is {expected[0]} → {expected[1]}; it "
                f"was trained for {adapter.manifest.base_model or 'another model'}",
                key=adapter.key,
            )
