"""Eviction policies, one a file, and how they are found by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from lora_cache.errors import ConfigError
from lora_cache.policies.auto import Auto
from lora_cache.policies.base import Explains, Policy, RemovalReason, explain
from lora_cache.policies.fifo import FIFO
from lora_cache.policies.gdsf import GDSF
from lora_cache.policies.lfu import LFU
from lora_cache.policies.lru import LRU
from lora_cache.policies.lru_k import LRUK
from lora_cache.policies.sieve import Sieve
from lora_cache.policies.slru import SLRU
from lora_cache.spec import call_with, parse_spec

__all__ = [
    "FIFO",
    "GDSF",
    "LFU",
    "LRU",
    "LRUK",
    "SLRU",
    "Auto",
    "Explains",
    "Policy",
    "PolicyLike",
    "RemovalReason",
    "Sieve",
    "explain",
    "make_policy",
    "policy_names",
]

#: A name, with or without settings (``"lfu:half_life_s=60"``), or something that makes a fresh
#: policy (a class, a function, a ``partial``).
PolicyLike = str | Callable[[], Policy]

_BUILT_IN: dict[str, Callable[..., Policy]] = {
    "auto": Auto,
    "fifo": FIFO,
    "gdsf": GDSF,
    "lfu": LFU,
    "lru": LRU,
    "lru_k": LRUK,
    "sieve": Sieve,
    "slru": SLRU,
}
_GROUP = "lora_cache.policies"


def policy_names() -> list[str]:
    """Names that `make_policy` accepts: the built-in ones and those of installed entry points."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=_GROUP))})


def make_policy(policy: PolicyLike) -> Policy:
    """Make a fresh policy.

    Args:
        policy: a name from `policy_names`, which settings may follow as in
            ``"lfu:half_life_s=inf"``, or a callable that returns a policy.  An instance is
            refused: each tier needs its own.

    Raises:
        ConfigError: the name or a setting is unknown, or what was made is no policy.
    """
    if isinstance(policy, str):
        name, settings = parse_spec(policy)
        made = call_with(_BUILT_IN.get(name) or _load(name), settings, f"policy {name}")
    elif callable(policy):
        made = policy()
    else:
        raise ConfigError(
            f"{policy!r} is not a policy: give a name or a class, so that each tier gets its own"
        )
    if not isinstance(made, Policy):
        raise ConfigError(f"{policy!r} made a {type(made).__name__}, which is not a Policy")
    return made


def _load(name: str) -> Callable[..., Policy]:
    for point in entry_points(group=_GROUP, name=name):
        loaded: Callable[..., Policy] = point.load()
        return loaded
    raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(policy_names())}")
