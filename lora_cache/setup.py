"""What the settings mean for the parts of a cache."""

from __future__ import annotations

from lora_cache.config import CacheConfig
from lora_cache.engines import Capabilities
from lora_cache.errors import ConfigError
from lora_cache.planner import Limits
from lora_cache.store import DiskTier


def disk_tier(config: CacheConfig) -> DiskTier:
    """The disk tier that `config` describes; nothing is touched before it is used."""
    return DiskTier(
        config.disk_dir,
        max_bytes=config.disk_bytes,
        policy=config.disk_policy,
        workers=config.fetch_workers,
    )


def limits_of(config: CacheConfig, engine: Capabilities) -> Limits:
    """What the planner may plan with.

    Raises:
        ConfigError: `config` contradicts the engine.
    """
    for name, said, is_ in (
        ("max_loras", config.max_loras, engine.max_loras),
        ("max_cpu_loras", config.max_cpu_loras, engine.max_cpu_loras),
    ):
        if said is not None and said != is_:
            raise ConfigError(
                f"{name}={said} contradicts the engine, which was started with {is_}: leave it "
                "out, or start the engine with it"
            )
    return Limits(
        slots=engine.slots,
        host_entries=engine.host_entries,
        host_bytes=config.host_bytes,
        stages_without_slot=engine.stages_without_slot,
        max_in_flight=engine.max_in_flight,
        max_speculative=engine.max_speculative,
        drain_after_s=config.drain_after_s,
        retry_s=config.retry_s,
        retry_max_s=config.retry_max_s,
        # As long as pressure must be gone before it counts as over: by then a step has shown.
        shrink_every_s=config.host_marks.dwell_s,
    )
