"""LoRA adapter lifecycle manager for vLLM, with explicit control of the GPU cache.

Importing this package imports neither torch nor vLLM.
"""

from lora_cache._version import __version__
from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.cache import AsyncLoraCache
from lora_cache.config import CacheConfig
from lora_cache.errors import LoraCacheError
from lora_cache.lease import Lease
from lora_cache.manifest import Manifest, read_manifest
from lora_cache.state import CopyState, Tier
from lora_cache.views import AdapterStatus, Snapshot, Stats

__all__ = [
    "Adapter",
    "AdapterKey",
    "AdapterRef",
    "AdapterStatus",
    "AsyncLoraCache",
    "CacheConfig",
    "CopyState",
    "Lease",
    "LoraCacheError",
    "Manifest",
    "Snapshot",
    "Stats",
    "Tier",
    "__version__",
    "read_manifest",
]
