"""`Ranking` is a sorted list, only faster."""

from __future__ import annotations

import time
from itertools import islice

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lora_cache.policies.ranking import Ranking
from tests.policies.notify import key_of

STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "remove"]), st.integers(0, 7), st.integers(0, 3)),
    max_size=80,
)


@settings(deadline=None, phases=(Phase.reuse, Phase.generate, Phase.shrink))
@given(steps=STEPS)
def test_like_sorting(steps: list[tuple[str, int, int]]) -> None:
    ranking = Ranking()
    model: dict[int, int] = {}  # score by number, in the order of the last `put`
    for kind, number, score in steps:
        if kind == "put":
            model.pop(number, None)
            model[number] = score
            ranking.put(key_of(number), score)
            assert ranking.score(key_of(number)) == score
        elif number in model:
            assert ranking.remove(key_of(number)) == model.pop(number)
        expected = [key_of(n) for n in sorted(model, key=lambda n: model[n])]
        assert list(ranking) == expected
        assert [key for _, _, key in ranking._heap[:1]] == expected[:1]  # nothing before it


def test_outdated_entries_are_dropped() -> None:
    ranking = Ranking()
    for number in range(100):
        ranking.put(key_of(number), 0)
    for use in range(10_000):  # of all but the first, which stays in front of them
        ranking.put(key_of(1 + use % 99), use)
    assert len(ranking._heap) <= 2 * 100 + 8


def test_the_first_of_many_costs_little() -> None:
    """Sorting 4,000 keys takes milliseconds; one look at the first must not."""
    ranking = Ranking()
    for number in range(4000):
        ranking.put(key_of(number), -number)

    def seconds(size: int) -> float:
        began = time.perf_counter()
        for _ in range(5):
            assert len(list(islice(ranking, size))) == size
        return time.perf_counter() - began

    assert min(seconds(1) for _ in range(3)) < seconds(4000) / 100
