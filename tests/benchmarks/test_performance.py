"""The tables of docs/performance.md are what their raw figures say."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import performance, plot_arrival, plot_serving
from benchmarks.gpu import rig, serving, slo
from benchmarks.gpu.parts import Parts
from lora_cache.engines.resident.host_images import LoadTimes
from lora_cache.key import AdapterKey

SPREAD = {"median_ms": 2.0, "p90_ms": 3.0, "max_ms": 4.0}
LOADED = ("examined", "packed", "locked", "waited", "copied", "scattered", "published")
PARTS = {name: {"median_ms": 1.0} for name in LOADED}
ABOUT: dict[str, Any] = {
    "device": "a GPU",
    "cores": 16,
    "versions": {"vllm": "0.26.0"},
    "command": "python3 -m benchmarks",
}


def idle(server: str, where: str, **more: Any) -> dict[str, Any]:
    row = {"table": "idle", "server": server, "from": where, **SPREAD}
    return row | {"resolved": {"median_ms": 0.5}, "first_token": {"median_ms": 9.0}} | more


ARRIVALS = ABOUT | {
    "rows": [
        idle("resident", "disk", median_ms=58.0, parts=PARTS),
        idle("resident", "slot", median_ms=0.7),
        idle("vllm", "disk", median_ms=205.4),
        {"table": "beside", "server": "vllm", "from": "cold"}
        | {"longest_gap": SPREAD, "first_token": SPREAD},
        {"table": "ten in a second", "server": "vllm", "from": "cold", "longest_gap": SPREAD},
    ]
}
SERVED = {
    **dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms"), 12.345),
    "gap_p999_ms": None,
    "requests_per_s": 7.9,
}
SERVING = ABOUT | {
    "rows": [{"server": "ideal", "row": "warm", "rate": 8.0, "seed": 0, **SERVED}],
}


def slo_row(server: str, rate: float, kept: bool) -> dict[str, Any]:
    return {"server": server, "rate": rate, "kept": kept, "promise_ms": 650.0, **SERVED}


SLO = ABOUT | {
    "rows": [
        slo_row("ideal", 2, True),
        slo_row("ideal", 4, True),
        slo_row("vllm", 2, False),
        slo_row("vllm", 4, True),
        slo_row("resident", 2, True),
        slo_row("resident", 4, False),
    ]
}

KERNELS = ABOUT | {
    "layers": 2,
    "rows": [{"tokens": 16, "default_us": 30.0, "us": 10.0, "active_us": 9.0}],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for file, _ in performance.TABLES.values():
        kind = file.partition("_")[0]
        raw = {"arrivals": ARRIVALS, "serving": SERVING, "slo": SLO, "lora": KERNELS}[kind]
        (tmp_path / file).write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.parametrize("name", performance.TABLES)
def test_the_page_says_what_the_raw_figures_say(name: str) -> None:
    there = performance.between(performance.PAGE.read_text(), name)[0]
    tables = performance.made()
    if name in tables:
        assert there.strip() == tables[name], "run: python -m benchmarks.performance"
    else:
        assert not there.strip(), f"{name} has no raw figures"


def test_tables_are_written_between_their_markers(results: Path) -> None:
    tables = performance.made(results)
    assert tables.keys() == performance.TABLES.keys()
    page = performance.written(performance.PAGE.read_text(), tables)
    assert all(performance.between(page, name)[0].strip() == tables[name] for name in tables)
    assert performance.written(page, tables) == page


def test_without_raw_figures_nothing_is_written(tmp_path: Path) -> None:
    assert performance.made(tmp_path) == {}


def test_numbers_get_three_digits(results: Path) -> None:
    tables = performance.made(results)
    assert "| on disk | vLLM | 205 | 3 | 4 |" in tables["arrivals"]
    assert "| warm | 8 | 0 | no loads at all | 12.3 | 12.3 | 12.3 | – | 7.9 |" in tables["serving"]


def test_the_highest_rate_is_one_below_which_no_promise_was_broken(results: Path) -> None:
    assert slo.highest(SLO["rows"]) == {"ideal": 4, "resident": 2}
    said = performance.made(results)["slo"]
    assert "no loads at all: 4 requests/s; vLLM: none; resident engine: 2 requests/s." in said


def test_the_parts_of_an_arrival_add_up() -> None:
    for label, parts in plot_arrival.bars(ARRIVALS):
        whole = {"on disk: vLLM": 205.4, "on disk: resident engine": 58, "in a slot": 0.7}
        expected = next(ms for name, ms in whole.items() if label.startswith(name))
        assert sum(parts.values()) == pytest.approx(expected + 9)


def test_waits_are_drawn_seed_by_seed_without_those_that_never_ended(tmp_path: Path) -> None:
    rows = [
        {"row": row, "rate": 8.0, "server": server, "ttft_p50_ms": 50.0, "ttft_p99_ms": p99}
        for row, server, p99 in [
            ("warm", "resident", 90.0),
            ("warm", "resident", 95.0),
            ("warm", "ideal", 80.0),
            ("cold", "vllm", None),
        ]
    ]
    assert plot_serving.lines({"rows": rows}, "warm") == [
        ("no loads at all, 8/s", "ideal", [(50, 80)]),
        ("resident engine, 8/s", "resident", [(50, 90), (50, 95)]),
    ]
    assert plot_serving.lines({"rows": rows}, "cold") == []
    pytest.importorskip("matplotlib")
    plot_serving.draw({"rows": rows}, tmp_path / "serving.svg")
    assert (tmp_path / "serving.svg").stat().st_size > 1000


def test_the_arrival_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("arrival.svg", "arrival.png"):
        plot_arrival.draw(ARRIVALS, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


# ---------------------------------------------------------------------- what the GPU scripts draw


def test_a_scenario_is_a_set_of_defaults() -> None:
    options = serving.parse(["--scenario", "thousand", "--rates", "4"])
    assert (options.adapters, options.rank, options.host, options.rates) == (1000, 8, 100, [4.0])
    assert serving.parse([]).host == 200


def test_servers_are_measured_side_by_side_and_some_for_few_seeds() -> None:
    options = serving.parse(["--servers", "ideal,vllm:1", "--seeds", "5,6", "--rates", "8,16"])
    assert serving.schedule(options) == [
        (5, 8.0, "ideal"),
        (5, 8.0, "vllm"),
        (5, 16.0, "ideal"),
        (5, 16.0, "vllm"),
        (6, 8.0, "ideal"),
        (6, 16.0, "ideal"),
    ]


def test_popularity_falls_with_the_rank() -> None:
    options = slo.parse([])
    ranks = slo.ranks_of(options)
    assert len(ranks) == 100
    weights = slo.popularity(ranks, 1.0, 0)
    assert sum(weights) == pytest.approx(sum(1 / place for place in range(1, 6)))
    shares = [
        sum(w for w, its in zip(weights, ranks, strict=True) if its == rank)
        for rank in options.ranks
    ]
    assert shares == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_lengths_are_of_prompts_and_answers() -> None:
    found = slo.lengths()
    assert len(found) == 1000
    assert sorted(asked for asked, _ in found)[500] > 900
    assert min(min(pair) for pair in found) >= 1


def test_a_promise_needs_an_ideal() -> None:
    with pytest.raises(SystemExit):
        slo.parse(["--servers", "resident"])
    assert isinstance(slo.parse(["--servers", "vllm", "--promise-ms", "9"]), argparse.Namespace)


def test_the_parts_of_a_load_add_up() -> None:
    key = AdapterKey("sha256:1", "one")
    load = LoadTimes(key, 0.001, 0.02, 0.0, 0.010, 0.006, 0.001, 0.003, 0.0005)
    times = [load]
    server = SimpleNamespace(cache=SimpleNamespace(_engine=SimpleNamespace(load_times=times)))
    found = Parts.of(server).take()["parts"]
    command = ("waited", "copied", "scattered", "published", "told")
    assert sum(found[name]["median_ms"] for name in command) == pytest.approx(10)
    assert found["told"]["median_ms"] == 4
    assert Parts.of(server).take() == {}  # each load counts once
    assert Parts.of(SimpleNamespace(name="vllm")).take() == {}


def test_files_in_memory_cannot_be_uncached() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no directory in memory")
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        adapter = Path(directory) / "adapter"
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(bytes(1 << 16))
        with pytest.raises(SystemExit, match="--files"):
            rig.uncache([adapter])
