"""Synthetic traffic is what its name says, the same for the same seed, and flat in memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import pytest

from lora_cache.errors import ConfigError
from lora_cache.sim import Request
from lora_cache.sim.generators import KINDS, SyntheticTrace


def draw(spec: str, seed: int = 0) -> list[Request]:
    return list(SyntheticTrace(spec, seed))


def popular(requests: list[Request], count: int = 5) -> list[str]:
    return [name for name, _ in Counter(r.adapter for r in requests).most_common(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_seeded_and_in_order_of_time(kind: str) -> None:
    trace = SyntheticTrace(f"{kind}:requests=20000,adapters=50,seed=4")
    requests = list(trace)
    assert trace.requests == len(requests) == 20_000
    assert requests == list(trace), "a second reading is the same"
    assert requests == draw(f"{kind}:requests=20000,adapters=50", seed=4)
    assert requests != draw(f"{kind}:requests=20000,adapters=50", seed=5)
    assert requests[:9000] == draw(f"{kind}:requests=9000,adapters=50,seed=4"), "a prefix"
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(requests))
    assert all(r.input_tokens >= 1 and r.output_tokens >= 1 for r in requests)
    known = {f"a{number}" for number in range(50)}
    if kind != "scans":
        assert {r.adapter for r in requests} <= known


def test_popularity_follows_the_law() -> None:
    counts = Counter(r.adapter for r in draw("zipf:adapters=100,skew=1.0,requests=200000"))
    harmonic = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 5, 20, 100):
        expected = 200_000 / rank / harmonic
        assert abs(counts[f"a{rank - 1}"] - expected) < 4 * expected**0.5
    flat = Counter(r.adapter for r in draw("zipf:adapters=10,skew=0,requests=50000"))
    assert max(flat.values()) < 1.1 * min(flat.values())


def test_rate_and_tokens_have_their_means() -> None:
    requests = draw("zipf:requests=100000,rate=4,input_tokens=300,output_tokens=20")
    assert requests[-1].time_s == pytest.approx(100_000 / 4, rel=0.02)
    assert sum(r.input_tokens for r in requests) / 100_000 == pytest.approx(300, rel=0.02)
    assert sum(r.output_tokens for r in requests) / 100_000 == pytest.approx(20, rel=0.02)
    assert {r.output_tokens for r in draw("zipf:requests=100,output_tokens=1")} == {1}


def test_phases_change_who_is_popular_at_once() -> None:
    requests = draw("phases:adapters=200,every=10000,requests=30000")
    first, second, third = (popular(requests[i : i + 10_000]) for i in (0, 10_000, 20_000))
    assert first == ["a0", "a1", "a2", "a3", "a4"]
    assert len({*first, *second, *third}) > 10
    assert popular(requests[10_000:15_000], 1) == popular(requests[15_000:20_000], 1)


def test_drift_moves_the_centre_one_by_one() -> None:
    requests = draw("drift:adapters=40,every=2000,requests=80000")
    for step in (0, 7, 39):
        centre = Counter(r.adapter for r in requests[step * 2000 : (step + 1) * 2000])
        assert centre.most_common(1)[0][0] == f"a{step}"
        assert {name for name, _ in centre.most_common(3)} <= {
            f"a{(step + aside) % 40}" for aside in (-1, 0, 1)
        }


def test_days_have_nights_and_zones_have_days_of_their_own() -> None:
    requests = draw("daily:adapters=30,zones=3,requests=129600,rate=1,depth=0.8")
    hours = Counter(int(r.time_s % 86_400 // 3600) for r in requests if r.time_s < 86_400)
    assert hours[12] > 5 * hours[0]
    assert requests[-1].time_s == pytest.approx(1.5 * 86_400, rel=0.01), "noon of the second day"

    def share(zone: int, hour: int) -> float:
        then = [r for r in requests if r.time_s // 3600 == hour]
        return sum(int(r.adapter[1:]) % 3 == zone for r in then) / len(then)

    assert share(0, 12) > 2 * share(0, 1)
    assert share(1, 20) > 2 * share(1, 8)


def test_scans_ask_once_and_never_again() -> None:
    counts = Counter(r.adapter for r in draw("scans:adapters=20,every=100,length=30,requests=5000"))
    once = [name for name in counts if name.startswith("once")]
    assert len(once) == 50 * 30
    assert {counts[name] for name in once} == {1}


def test_a_flash_crowd_takes_its_share_and_goes() -> None:
    requests = draw("flash:adapters=500,every=5000,length=1000,share=0.6,requests=10000")
    crowd, crowd_share = Counter(r.adapter for r in requests[4000:5000]).most_common(1)[0]
    assert 550 < crowd_share < 750
    assert sum(r.adapter == crowd for r in requests[:4000]) < 500
    assert popular(requests[9000:], 1) != [crowd]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zipf:adaptors=3", "no setting 'adaptors'"),
        ("zipf:name=x", "no setting 'name'"),
        ("zipf:every=3", "no setting 'every'"),
        ("zipf:adapters=0", "adapters='0'"),
        ("zipf:adapters=1.5", "adapters='1.5'"),
        ("zipf:skew=-1", "skew='-1'"),
        ("zipf:skew=nan", "skew='nan'"),
        ("zipf:requests=none", "requests='none'"),
        ("daily:depth=2", "depth='2'"),
        ("zipf:seed=1,seed=2", "seed twice"),
        ("zipf:seed", "not of the form setting=value"),
        ("wave:seed=1", "unknown traffic 'wave'"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SyntheticTrace(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_memory_does_not_grow_with_the_length() -> None:
    def peak(requests: int) -> int:
        tracemalloc.start()
        for _ in SyntheticTrace(f"zipf:adapters=100,requests={requests}"):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10_000)
    assert peak(100_000) < 1.2 * peak(20_000)
