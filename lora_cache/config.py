"""Settings of a cache, validated in one place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from lora_cache.errors import ConfigError
from lora_cache.memory.pressure import GPU_MARKS, HOST_MARKS, Marks
from lora_cache.planner import DRAIN_AFTER_S
from lora_cache.policies import PolicyLike


class CacheSettings(TypedDict, total=False):
    """Keyword arguments of `AsyncLoraCache`; `CacheConfig` says what each means."""

    engine: str
    policy: PolicyLike
    host_policy: PolicyLike | None
    host_bytes: int | str | None
    max_loras: int | None
    max_cpu_loras: int | None
    disk_dir: str | os.PathLike[str] | None
    disk_bytes: int | str | None
    disk_policy: PolicyLike
    fetch_workers: int
    image_dir: str | os.PathLike[str] | None
    image_bytes: int | str
    lease_timeout_s: float | None
    drain_after_s: float
    retry_s: float
    retry_max_s: float
    check_weights: bool
    memory_pressure: bool
    memory_period_s: float
    host_marks: Marks
    gpu_marks: Marks
    publish: bool


class CacheConfig(BaseModel):
    """What a cache is told; everything has a default.

    Attributes:
        engine: how vLLM is driven: ``"stock"`` (its public API, nothing changed), ``"resident"``
            (slots of our own, for a vLLM that was started with ``LORA_CACHE_RESIDENT=1``), or
            ``"auto"``: resident if that is set, else stock.
        policy: who leaves a slot: a name such as ``"lru"`` (`lora_cache.policies.policy_names` has
            them all), or a class.
        host_policy: who leaves host memory; the same policy, if not given.
        host_bytes: budget for adapters in host memory, in bytes or like ``"20GiB"``: what they take
            there on the resident engine, over all workers; on the stock engine an estimate, the
            file once for each worker.  If not given, the number that the engine holds is the
            limit, and for the resident engine half of the memory that is left to it (control
            groups count) when the cache is opened.
        disk_dir: where adapters of the Hub are kept; ``~/.cache/lora-cache/store`` if not given.
            Several processes may share it.
        disk_bytes: budget for them, in bytes or like ``"200GiB"``; unlimited, if not given.
        disk_policy: who leaves the disk when that is reached.
        fetch_workers: adapters that are fetched at a time.
        image_dir: where the resident engine keeps what it has packed, so that it need not be packed
            again; ``~/.cache/lora-cache/images`` if not given.  Several processes may share it.
        image_bytes: budget for that, in bytes or like ``"50GiB"``; 0 keeps nothing.
        max_loras, max_cpu_loras: what you believe the engine was started with; an error if it
            was not.  The engine's own numbers are what counts.
        lease_timeout_s: how long a lease waits for a slot, if the caller does not say.
        drain_after_s: when the oldest waiter has waited this long, a victim takes no new leases.
            About as long as an answer takes; less makes more requests wait.
        retry_s, retry_max_s: a failed adapter fails fast for `retry_s` seconds, twice as long
            after each further failure, up to `retry_max_s`.
        check_weights: read every weight of a new adapter once, and refuse NaN and infinity.
        memory_pressure: watch host and GPU memory; while it is scarce, begin nothing optional, and
            give host memory back (`lora_cache.planner.squeeze`).  Requests are served as before.
        memory_period_s: seconds between two looks at it; more where a look is slow, so that
            watching never takes more than a thousandth of a core.
        host_marks, gpu_marks: when memory is scarce: shares in use, 0 to 1.
        publish: let ``lora-cache status`` on this machine see this cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: Literal["auto", "stock", "resident"] = "auto"
    policy: Any = "auto"
    host_policy: Any = None
    host_bytes: ByteSize | None = Field(default=None, gt=0)
    disk_dir: Path | None = None
    disk_bytes: ByteSize | None = Field(default=None, gt=0)
    disk_policy: Any = "lru"
    fetch_workers: int = Field(default=4, ge=1, le=64)
    image_dir: Path | None = None
    image_bytes: ByteSize = Field(default=ByteSize(50 << 30), ge=0)
    max_loras: int | None = Field(default=None, ge=1)
    max_cpu_loras: int | None = Field(default=None, ge=1)
    lease_timeout_s: float | None = Field(default=None, gt=0)
    drain_after_s: float = Field(default=DRAIN_AFTER_S, ge=0)
    retry_s: float = Field(default=1.0, ge=0)
    retry_max_s: float = Field(default=60.0, ge=0)
    check_weights: bool = False
    memory_pressure: bool = True
    memory_period_s: float = Field(default=0.7, gt=0)  # a change is noticed within a second
    host_marks: Marks = HOST_MARKS
    gpu_marks: Marks = GPU_MARKS
    publish: bool = True

    @classmethod
    def of(cls, settings: CacheSettings) -> CacheConfig:
        """Validate keyword arguments.

        Raises:
            ConfigError: a name is unknown or a value out of range; says which.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise ConfigError(f"unknown setting {name!r}: there are {known}") from error
            raise ConfigError(f"{name}={first['input']!r}: {first['msg']}") from error
