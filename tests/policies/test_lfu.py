"""What is LFU's own: the weight of a use halves every `half_life_s`."""

from __future__ import annotations

import pytest

from lora_cache.errors import ConfigError
from lora_cache.policies import LFU
from tests.policies.notify import load, prefetch, ranking, use


def test_forgets_with_time() -> None:
    """An adapter that was hot ten half-lives ago loses to one that is warm now."""
    policy = LFU(half_life_s=10.0)
    prefetch(policy, 1, 2)
    use(policy, *[1] * 50)
    use(policy, 2, now=1.0)
    assert ranking(policy, 1.0) == [2, 1]
    use(policy, 2, 2, 2, now=100.0)
    assert ranking(policy, 100.0) == [1, 2]


def test_counts_decay_by_the_formula() -> None:
    """Uses at t=0 and t=10 weigh 1/2 + 1 = 1.5 with a half-life of 10; two at t=10 weigh 2."""
    policy = LFU(half_life_s=10.0)
    prefetch(policy, 1)
    load(policy, 2, now=10.0)
    use(policy, 1, now=10.0)  # most recent, but lighter
    assert ranking(policy, 10.0) == [1, 2]


def test_half_life_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="half_life_s"):
        LFU(0)
