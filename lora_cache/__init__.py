"""LoRA adapter lifecycle manager for vLLM, with explicit control of the GPU cache.

Importing this package imports neither torch nor vLLM.
"""

from typing import TYPE_CHECKING, Any

from lora_cache._version import __version__
from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.cache import AsyncLoraCache
from lora_cache.config import CacheConfig
from lora_cache.errors import LoraCacheError
from lora_cache.events import BudgetEvent, Eviction
from lora_cache.lease import Lease
from lora_cache.manifest import Manifest, read_manifest
from lora_cache.state import CopyState, Tier
from lora_cache.views import AdapterStatus, MemoryStatus, Snapshot, Stats

if TYPE_CHECKING:
    from lora_cache.llm import LLM as LLM

__all__ = [
    "Adapter",
    "AdapterKey",
    "AdapterRef",
    "AdapterStatus",
    "AsyncLoraCache",
    "BudgetEvent",
    "CacheConfig",
    "CopyState",
    "Eviction",
    "Lease",
    "LoraCacheError",
    "Manifest",
    "MemoryStatus",
    "Snapshot",
    "Stats",
    "Tier",
    "__version__",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    """`LLM` is a subclass of vLLM's: only who asks for it imports vLLM."""
    if name == "LLM":
        try:
            from lora_cache.llm import LLM
        except ImportError as error:
            from lora_cache.errors import MissingExtraError

            raise MissingExtraError(
                "lora_cache.LLM needs vLLM: pip install 'lora-cache[vllm]'"
            ) from error
        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
