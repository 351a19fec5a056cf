"""Pictures: drawn, the same each time, and what they are drawn from."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.errors import ConfigError
from lora_cache.sim import Hold, Request, Setup, open_trace, simulate
from lora_cache.sim.plots import check_path, plot_misses, plot_timeline, spread
from lora_cache.sim.timeline import IN_HOST, IN_SLOT, NOWHERE, record_timeline
from tests.sim.traces import ListTrace, asking

pytest.importorskip("matplotlib")


@pytest.mark.long
@pytest.mark.parametrize("name", ["m.svg", "m.png", "M.SVG"])
@pytest.mark.parametrize("traces", [1, 4])
def test_misses_are_drawn_the_same_each_time(tmp_path: Path, name: str, traces: int) -> None:
    rows = []
    for seed in range(traces):
        trace = open_trace(f"zipf:adapters=20,requests=300,seed={seed}")
        rows += simulate(trace, ["lru", "lfu", "belady"], [1, 2, 8])
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        plot_misses(rows, tmp_path / directory / name)
    first, second = ((tmp_path / directory / name).read_bytes() for directory in "ab")
    assert first == second
    assert first.startswith(b"<?xml" if name.lower().endswith("svg") else b"\x89PNG")
    assert len(first) > 5000


def test_one_size_without_belady_and_with_leases_held(tmp_path: Path) -> None:
    setup = Setup(belady=False, hold=Hold(1.0))
    plot_misses(simulate(asking("ABC" * 9), ["lru"], [2], setup), tmp_path / "m.svg")
    assert (tmp_path / "m.svg").stat().st_size > 5000


@given(
    wanted=st.lists(st.floats(0, 100), min_size=1, max_size=12).map(sorted),
    gap=st.floats(0.1, 20),
)
def test_names_never_overlap_and_stay_in_order(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap)
    assert len(places) == len(wanted)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(places))
    assert sum(places) == pytest.approx(sum(wanted)), "moved either way by the same distance"
    if all(b - a >= gap for a, b in itertools.pairwise(wanted)):
        assert places == pytest.approx(wanted)


def test_who_was_where() -> None:
    trace = asking("AABBAABBCCCC", every_s=10.0)  # t = 0 … 110
    line = record_timeline(trace, "lru", 1, Setup(host_entries=2), columns=11)
    assert line.adapters == ["A", "B", "C"]
    assert (line.start_s, line.end_s, line.others) == (0.0, 110.0, 0)
    # Columns end at 10, 20, …: what is asked at 20 is seen in the column that ends at 30.
    slot, host, none = IN_SLOT, IN_HOST, NOWHERE
    assert list(line.tiers[0]) == [slot] * 2 + [host] * 2 + [slot] * 2 + [host] * 2 + [none] * 3
    assert list(line.tiers[1]) == [none] * 2 + [slot] * 2 + [host] * 2 + [slot] * 2 + [host] * 3
    assert list(line.tiers[2]) == [none] * 8 + [slot] * 3
    assert line.miss_ratios == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0]


def test_a_timeline_of_leases_held() -> None:
    trace = ListTrace(
        Request(time_s, name, 1, 1) for time_s, name in ((0, "A"), (1, "B"), (20, "A"))
    )
    line = record_timeline(trace, "lru", 1, Setup(hold=Hold(4.0)), columns=20)
    b = line.tiers[line.adapters.index("B")]
    first = list(b).index(IN_SLOT)
    assert first == 4, "B comes into its slot when A's lease ends, after 4.2 s"
    assert line.miss_ratios.count(None) == 18


def test_order_of_adapters() -> None:
    steady = record_timeline(open_trace("zipf:adapters=9,requests=9000"), "lru", 2, columns=10)
    assert steady.adapters == [f"a{number}" for number in range(9)], "the busiest first"
    spec = "drift:adapters=24,skew=1.5,every=300,requests=7200"
    drifting = record_timeline(open_trace(spec), "lru", 2, columns=10)
    places = [int(name[1:]) for name in drifting.adapters]
    assert all(abs(place - number) <= 2 for number, place in enumerate(places)), places
    few = record_timeline(open_trace("zipf:adapters=9,requests=900"), "lru", 2, columns=9, most=4)
    assert (len(few.adapters), len(few.tiers), few.others) == (4, 4, 5)


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_timelines_are_drawn(tmp_path: Path, policy: str) -> None:
    trace = open_trace("phases:adapters=60,every=500,requests=1500")
    plot_timeline(record_timeline(trace, policy, 4, Setup(host_entries=9)), tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_no_time_no_timeline() -> None:
    with pytest.raises(ConfigError, match="spans no time"):
        record_timeline(asking("A"), "lru", 1)


def test_paths_are_checked_before_anything_is_begun(tmp_path: Path) -> None:
    check_path(tmp_path / "fine.png")
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        check_path(tmp_path / "misses.pdf")
    with pytest.raises(ConfigError, match="there is no directory"):
        check_path(tmp_path / "nowhere" / "misses.svg")
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(ConfigError, match=r"taken\.svg"):
        plot_misses(simulate(asking("AB"), ["lru"], [1]), tmp_path / "taken.svg")


def test_without_matplotlib_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; import lora_cache.sim.plots as plots\n"
        "try: plots.check_path(Path('a.svg'))\n"
        "except plots.MissingExtraError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pip install 'lora-cache[plot]'" in done.stdout
