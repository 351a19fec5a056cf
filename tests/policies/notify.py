"""Tell a policy what happened, in the fewest words."""

from __future__ import annotations

from lora_cache.adapter import AdapterKey
from lora_cache.policies import Policy, RemovalReason


def key_of(number: int) -> AdapterKey:
    return AdapterKey(f"k:{number}", f"a{number}")


def prefetch(
    policy: Policy, *numbers: int, now: float = 0.0, nbytes: int = 1, cost_s: float = 1.0
) -> None:
    """Inserted, and used by nobody yet."""
    for number in numbers:
        policy.on_insert(key_of(number), nbytes, cost_s, now)


def use(policy: Policy, *numbers: int, now: float = 0.0) -> None:
    for number in numbers:
        policy.on_access(key_of(number), now)


def load(
    policy: Policy, *numbers: int, now: float = 0.0, nbytes: int = 1, cost_s: float = 1.0
) -> None:
    """Inserted because of a request, and used by it."""
    for number in numbers:
        prefetch(policy, number, now=now, nbytes=nbytes, cost_s=cost_s)
        use(policy, number, now=now)


def evict(policy: Policy, *numbers: int) -> None:
    for number in numbers:
        policy.on_remove(key_of(number), RemovalReason.EVICTED)


def unload(policy: Policy, *numbers: int) -> None:
    for number in numbers:
        policy.on_remove(key_of(number), RemovalReason.REMOVED)


def ranking(policy: Policy, now: float = 0.0) -> list[int]:
    return [int(key.name[1:]) for key in policy.rank_victims(now)]
