"""Policies are found by name, and what is no policy is refused."""

from __future__ import annotations

import math

import pytest

from lora_cache import policies
from lora_cache.errors import ConfigError
from lora_cache.policies import LFU, Policy, make_policy, policy_names


@pytest.mark.parametrize("name", ["fifo", "gdsf", "lfu", "lru", "lru_k", "sieve", "slru"])
def test_built_in(name: str) -> None:
    assert name in policy_names()
    made = make_policy(name)
    assert isinstance(made, Policy)
    assert type(made).__name__.lower() == name.replace("_", "")
    assert type(made).__name__ in policies.__all__
    assert make_policy(name) is not made


def test_a_class_or_a_function_makes_a_policy() -> None:
    assert isinstance(make_policy(LFU), LFU)
    assert isinstance(make_policy(lambda: LFU(math.inf)), LFU)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'mru': choose one of auto, fifo, gdsf, "):
        make_policy("mru")
    with pytest.raises(ConfigError, match="not a Policy"):
        make_policy(dict)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give a name or a class"):
        make_policy(LFU())  # type: ignore[arg-type]
