"""What every engine that manages a vLLM does alike: one manager, ids, names, errors."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.engines.base import Capabilities
from lora_cache.engines.vllm_client import VllmClient, connect
from lora_cache.errors import ConfigError, EngineDeadError, LoadFailedError, LoraCacheError
from lora_cache.state import Tier

#: vLLM's server counts its own ids up from 1, and its second runner stores them as int32.
_FIRST_ID = 1 << 30

FOREIGN = "foreign:"

# Per engine object, whoever manages it: ids are never used twice in an engine's life, because
# vLLM would silently serve the weights that it still holds under the old id.
_next_id: WeakKeyDictionary[Any, count[int]] = WeakKeyDictionary()
_attached: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class ManagedVllm:
    """A `vllm.AsyncLLM` or a `vllm.LLM` under one manager at a time.

    Args:
        target: the engine, started with ``enable_lora=True``.

    Raises:
        ConfigError: LoRA is off, or the topology is one that cannot be managed.
    """

    _capabilities: Capabilities
    host_bytes: int | None = None

    def __init__(self, target: Any) -> None:
        self._target = target
        self._client: VllmClient = connect(target)
        _check_topology(self._client.vllm_config)
        self._requests: dict[AdapterKey, Any] = {}  # one LoRARequest a key, for ever
        self._keys: dict[int, AdapterKey] = {}  # the same, by lora_int_id

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def vllm_config(self) -> Any:
        """What vLLM was started with."""
        return self._client.vllm_config

    def charge(self, adapter: Adapter) -> int:
        """An estimate: its files, once for each worker."""
        return adapter.nbytes * self._capabilities.tensor_parallel

    def handle(self, key: AdapterKey) -> Any:
        return self._requests[key]

    def _claim(self) -> None:
        """Become the engine's manager.

        Raises:
            ConfigError: it has one.
        """
        if _attached.get(self._target):
            raise ConfigError("this engine already has a manager: close the other one first")
        _attached[self._target] = True

    def _disclaim(self) -> bool:
        """Be its manager no more.  Returns whether this was."""
        return bool(_attached.pop(self._target, False))

    def _fresh_id(self) -> int:
        return next(_next_id.setdefault(self._target, count(_FIRST_ID)))

    def _request_for(self, adapter: Adapter) -> Any:
        key, path = adapter.key, str(adapter.path)
        known = self._requests.get(key)
        if known is None or known.lora_path != path:
            from vllm.lora.request import LoRARequest

            number = self._fresh_id() if known is None else known.lora_int_id
            # The name carries the digest: vLLM's prefix cache tells adapters apart by name (0.26
            # by nothing else), and blocks of another revision must never match.
            self._requests[key] = LoRARequest(
                lora_name=f"{key.name}@{key.digest}", lora_int_id=number, lora_path=path
            )
            self._keys[number] = key
        return self._requests[key]

    def _id_of(self, key: AdapterKey) -> int:
        if key.digest.startswith(FOREIGN):
            return int(key.digest.removeprefix(FOREIGN))
        return int(self._requests[key].lora_int_id)

    def _key_of(self, lora_int_id: int) -> AdapterKey:
        return self._keys.get(lora_int_id) or AdapterKey(f"{FOREIGN}{lora_int_id}")

    def _map(
        self, error: BaseException, what: str, key: AdapterKey | None = None
    ) -> LoraCacheError:
        # vLLM raises what its layers raise (over the process boundary a plain Exception), so
        # nothing but the engine's own state tells a refused adapter from a dead engine.
        if self._client.is_dead:
            return EngineDeadError(f"{what}: the engine has died; build a new engine and cache")
        return LoadFailedError(f"{what}: {error}", key=key, tier=Tier.GPU)


def _check_topology(config: Any) -> None:
    if config.lora_config is None:
        raise ConfigError("LoRA is off: start vLLM with enable_lora=True")
    parallel = config.parallel_config
    refused = {
        "data_parallel_size > 1": parallel.data_parallel_size > 1,
        "pipeline_parallel_size > 1": parallel.pipeline_parallel_size > 1,
        "several nodes": getattr(parallel, "nnodes", 1) > 1,
        "api_server_count > 1": getattr(parallel, "_api_process_count", 1) > 1,
        "enable_sleep_mode": bool(getattr(config.model_config, "enable_sleep_mode", False)),
    }
    for what, present in refused.items():
        if present:
            raise ConfigError(
                f"an engine with {what} cannot be managed: run several engines, each with its "
                "own cache"
            )
