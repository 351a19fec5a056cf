"""The policies choose the victims that straightforward models of them choose, one by one.

For what no reference implementation defines as we do; the others are in `test_reference.py`.
"""

from __future__ import annotations

import pytest

from lora_cache.policies import GDSF, LRUK, SLRU
from tests.policies.models import GDSFModel, LRU2Model, SLRUModel
from tests.policies.replay import replay, replay_bytes, zipf_trace

SEEDS = [1, 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [1, 2, 4, 7, 16, 40])
def test_slru(slots: int, seed: int) -> None:
    """What fills the tier is used once, so the policy knows its size before anybody is protected.

    If more than 4/5 are protected while it fills, a policy that is told its size puts some of
    them back earlier, and in another order.
    """
    trace = [*range(1000, 1000 + slots), *zipf_trace(seed)]
    model = SLRUModel(slots)
    expected = [victim for number in trace for victim in model.request(number)]
    ours = replay(trace, SLRU, slots)
    assert ours.victims == expected
    assert ours.misses == model.misses
    assert len(expected) > 200


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize("history", [1, 7, 4096])
def test_lru_2_with_history(history: int, slots: int, seed: int) -> None:
    trace = zipf_trace(seed)
    model = LRU2Model(slots, history)
    expected = [victim for number in trace for victim in model.request(number)]
    ours = replay(trace, lambda: LRUK(history), slots)
    assert ours.victims == expected
    assert ours.misses == model.misses
    assert len(expected) > 300


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", [20, 60, 150])
def test_gdsf_with_costs_and_sizes(budget: int, seed: int) -> None:
    def nbytes(number: int) -> int:
        return 1 + number * 7 % 13

    def cost_s(number: int) -> float:
        return (1 + number * 11 % 17) / 16

    trace = zipf_trace(seed)
    model = GDSFModel(budget, nbytes, cost_s)
    expected = [victim for number in trace for victim in model.request(number)]
    ours = replay_bytes(trace, GDSF, budget, nbytes, cost_s)
    assert ours.victims == expected
    assert ours.misses == model.misses
    assert len(expected) > 300
