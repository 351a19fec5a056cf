"""The simulator agrees with others to the last miss.

With miss ratios that were counted independently, on traces that are not shipped: the directory
named by LORA_CACHE_TRACES, or ../shared/traces beside the repository.  LORA_CACHE_TRACES_FULL=1
checks every size (minutes) instead of one for each trace.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lora_cache.sim import FileTrace, Setup, open_trace, simulate

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent.parent
TRACES = Path(os.environ.get("LORA_CACHE_TRACES", ROOT.parent / "shared" / "traces"))
FULL = bool(os.environ.get("LORA_CACHE_TRACES_FULL"))

#: The policies of the table that are known here, and how they are called here.
KNOWN = {"LRU": "lru", "LFU, in-cache counts, no ageing": "lfu:half_life_s=inf", "Belady": "belady"}


def table() -> dict[str, dict[str, dict[int, float]]]:
    """trace → policy → slots → miss ratio, out of the table in the traces' README."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    slots: list[int] = []
    trace = ""
    for line in (TRACES / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["trace", "policy"]:
            slots = [int(cell.split()[0]) for cell in cells[2:]]
        elif slots and len(cells) == len(slots) + 2 and re.fullmatch(r"0?\.\d+", cells[2]):
            trace = cells[0] or trace
            ratios = map(float, cells[2:])
            found.setdefault(trace, {})[cells[1]] = dict(zip(slots, ratios, strict=True))
    return found


@pytest.mark.skipif(not (TRACES / "README.md").exists(), reason=f"no traces in {TRACES}")
@pytest.mark.parametrize(
    ("trace", "sizes"),
    [
        ("azure_functions_200", (4, 8, 16, 32) if FULL else (32,)),
        ("servegen_reason_73", (4, 8, 16, 32) if FULL else (16,)),
    ],
)
def test_agrees_with_the_table_of_the_traces(trace: str, sizes: tuple[int, ...]) -> None:
    expected = table()[trace]
    assert set(KNOWN) <= set(expected)
    file = FileTrace(TRACES / f"{trace}.csv.gz")
    rows = simulate(file, list(KNOWN.values()), sizes, Setup(belady=False))
    counted = {(row.policy, row.gpu_slots): row for row in rows}
    for name, policy in KNOWN.items():
        for slots in sizes:
            row = counted[policy, slots]
            assert row.requests == 200_000
            assert round(row.gpu_misses / row.requests, 4) == expected[name][slots], (name, slots)


SPECS = [
    "zipf:adapters=300,requests=10000",
    "phases:adapters=300,every=2000,requests=10000",
    "scans:adapters=100,requests=10000",
]


@pytest.mark.parametrize("spec", SPECS)
def test_agrees_with_libcachesim(spec: str) -> None:
    """Another simulator, in C, on the same requests: LRU and Belady."""
    libcachesim = pytest.importorskip("libcachesim")
    trace, slots = open_trace(spec, seed=2), 16
    asked = [request.adapter for request in trace]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(asked))}
    lru, belady = simulate(trace, ["lru", "belady"], [slots])

    cache = libcachesim.LRU(slots)
    missed = 0
    for at, name in enumerate(asked):
        request = libcachesim.Request(obj_id=numbers[name], obj_size=1, clock_time=at)
        missed += not cache.get(request)
    assert lru.gpu_misses == missed

    cache, missed = libcachesim.Belady(slots), 0
    upcoming: dict[str, int] = {}
    requests = []
    for at in range(len(asked) - 1, -1, -1):
        name = asked[at]
        request = libcachesim.Request(obj_id=numbers[name], obj_size=1, clock_time=at)
        request.next_access_vtime = upcoming.get(name, 2**62)
        upcoming[name] = at + 1
        requests.append(request)
    for request in reversed(requests):
        missed += not cache.get(request)
    assert belady.gpu_misses == missed == belady.belady_gpu_misses
