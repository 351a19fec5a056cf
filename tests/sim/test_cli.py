"""``lora-cache simulate``, as people and programs use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_cache.cli import app

ZIPF = "zipf:adapters=40,requests=2000,seed=1"
HEADER = "time_s,adapter,input_tokens,output_tokens,nbytes"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def rows_of(*arguments: object) -> list[dict[str, Any]]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def program(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_cache", "simulate", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([HEADER, *(f"{t},{name},1,10,50" for t, name in enumerate("ABAC"))]))
    return path


def test_json_is_a_list_of_rows(trace: Path) -> None:
    rows = rows_of(trace, ZIPF, "--gpu-slots", "2,4", "--policy", "lru,lfu:half_life_s=inf")
    assert [(r["trace"], r["gpu_slots"], r["policy"]) for r in rows] == [
        (name, slots, policy)
        for name in (str(trace), ZIPF)
        for slots in (2, 4)
        for policy in ("lru", "lfu:half_life_s=inf")
    ]
    first = rows[0]
    assert (first["requests"], first["gpu_misses"], first["host_misses"]) == (4, 3, 3)
    assert first["evictions"] == 1
    for row in rows:
        assert row["slot_hits"] + row["gpu_misses"] == row["requests"]
        assert row["belady_gpu_misses"] <= row["gpu_misses"]
        assert isinstance(row["evictions"], int)


@pytest.mark.long
def test_the_same_command_prints_the_same_bytes() -> None:
    for hold in ("none", "0.02/token"):
        arguments = ("zipf:requests=300", "--gpu-slots", "4,8", "--json", "--hold", hold)
        first, second = (program(*arguments, hash_seed=seed) for seed in ("1", "2"))
        assert first.returncode == second.returncode == 0, first.stderr
        assert first.stdout == second.stdout
        assert first.stderr == ""


def test_a_seed_is_for_traffic_that_names_none() -> None:
    def misses(spec: str, seed: int) -> int:
        (row,) = rows_of(spec, "--policy", "lru", "--seed", seed)
        return int(row["gpu_misses"])

    assert misses("zipf:requests=2000", 1) == misses("zipf:requests=2000", 1)
    assert misses("zipf:requests=2000", 1) != misses("zipf:requests=2000", 2)
    assert misses("zipf:requests=2000,seed=1", 5) == misses("zipf:requests=2000", 1)


def test_policies_by_several_options_and_all_by_default(trace: Path) -> None:
    named = rows_of(trace, "--policy", "lru,lfu", "--policy", "belady")
    assert [row["policy"] for row in named] == ["lru", "lfu", "belady"]
    assert {"lru", "lfu"} <= {row["policy"] for row in rows_of(trace)}
    assert {row["gpu_slots"] for row in rows_of(trace)} == {8}


def test_host_memory_in_adapters_and_in_bytes(trace: Path) -> None:
    (all_of_it,) = rows_of(trace, "--policy", "lru", "--gpu-slots", 1)
    (entries,) = rows_of(trace, "--policy", "lru", "--gpu-slots", 1, "--host", 2)
    (nbytes,) = rows_of(trace, "--policy", "lru", "--gpu-slots", 1, "--host", "149B")
    assert (all_of_it["host_entries"], all_of_it["host_bytes"]) == (None, None)
    assert (entries["host_entries"], entries["host_bytes"]) == (2, None)
    assert (nbytes["host_entries"], nbytes["host_bytes"]) == (None, 149)
    assert all_of_it["host_evictions"] == 0
    assert entries["host_evictions"] == nbytes["host_evictions"] == 1
    assert all_of_it["disk_to_host_bytes"] == 150
    (row,) = rows_of(ZIPF, "--policy", "lru", "--host", "20GiB", "--adapter-bytes", "1 GB")
    assert row["host_bytes"] == 20 << 30
    assert row["disk_to_host_bytes"] == row["host_misses"] * 10**9


def test_leases_held() -> None:
    (row,) = rows_of(ZIPF, "--policy", "lru", "--hold", "0.05/token", "--no-belady")
    assert row["hold"] == "0.05/token"
    assert row["wait_p99_s"] >= row["wait_p50_s"] > 0
    assert row["belady_gpu_misses"] is None


def test_a_table_for_people(trace: Path) -> None:
    result = invoke(trace, ZIPF, "--gpu-slots", "2,4", "--policy", "lru,lfu")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{trace}: 4 requests for 3 adapters"
    assert lines[1].split()[:3] == ["slots", "policy", "misses"]
    assert lines[2].split()[:4] == ["2", "lru", "75.00%", "3"]
    assert lines[3].split()[:2] == ["lfu", "75.00%"]
    assert f"{ZIPF}: 2,000 requests for 40 adapters" in lines
    assert result.stderr == ""
    held = invoke(ZIPF, "--policy", "lru", "--hold", "1")
    assert held.stdout.splitlines()[1].split()[-2:] == ["p50", "p99"]


def test_pictures(tmp_path: Path, trace: Path) -> None:
    pytest.importorskip("matplotlib")
    misses, timeline = tmp_path / "m.svg", tmp_path / "t.png"
    result = invoke(trace, "--plot", misses, "--timeline", timeline, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert misses.stat().st_size > 5000
    assert timeline.stat().st_size > 5000


BAD = {
    "backwards.csv": f"{HEADER}\n1,a,1,1,1\n0.5,a,1,1,1\n",
    "malformed.csv": f"{HEADER}\n1,a,1,1,1\n2,a,one,1,1\n",
    "columns.csv": "time_s,adapter\n1,a\n",
    "empty.csv": f"{HEADER}\n",
    "large.csv": f"{HEADER}\n0,small,1,1,1\n1,large,1,1,1000\n",
    "broken.jsonl": '{"time_s": 0, "adapter": "a"\n',
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dir}/backwards.csv"], "backwards.csv, line 3: time goes back from 1.0 to 0.5"),
        (["{dir}/malformed.csv"], "malformed.csv, line 3: input_tokens is 'one'"),
        (["{dir}/columns.csv"], "columns.csv, line 1: no column 'input_tokens'"),
        (["{dir}/empty.csv"], "empty.csv holds no requests"),
        (["{dir}/broken.jsonl"], "broken.jsonl, line 1: not JSON"),
        (["{dir}/large.csv", "--host", "100B"], "adapter large has 1000 bytes"),
        (["{dir}/nowhere.csv"], "nowhere.csv: no such file"),
        (["{dir}/trace.parquet"], "trace.parquet: a trace is a .csv or .jsonl file"),
        (["zapf:adapters=3"], "unknown traffic 'zapf'"),
        (["zipf:skew=steep"], "skew='steep'"),
        (["zipf", "--policy", "mru"], "unknown policy 'mru'"),
        (["zipf", "--policy", "lru:x=1"], "policy lru has no setting 'x'"),
        (["zipf", "--policy", "lru,"], "unknown policy ''"),
        (["zipf", "--gpu-slots", "0"], "at least one slot"),
        (["zipf", "--gpu-slots", "-4"], "at least one slot"),
        (["zipf", "--gpu-slots", "four"], "--gpu-slots four: give numbers"),
        (["zipf", "--gpu-slots", "8", "--host", "4"], "4 adapters is too small for 8 slots"),
        (["zipf", "--host", "much"], "--host much: give bytes"),
        (["zipf", "--host", "0GiB"], "--host 0GiB: give bytes"),
        (["zipf", "--host", "80MB"], "has 84000000 bytes"),
        (["zipf", "--adapter-bytes", "0"], "--adapter-bytes 0"),
        (["zipf", "--adapter-bytes", f"{'9' * 400}GB"], "give bytes"),
        (["zipf", "--hold", "long"], "hold is 'long'"),
        (["zipf", "--plot", "misses.pdf"], "misses.pdf: a picture is"),
        (["zipf", "--timeline", "{dir}/no/t.png"], "there is no directory"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
def test_errors_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, as_json: bool
) -> None:
    for name, text in BAD.items():
        (tmp_path / name).write_text(text)
    filled = [argument.replace("{dir}", str(tmp_path)) for argument in arguments]
    result = invoke(*filled, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_no_trace_is_wrong_usage() -> None:
    assert invoke().exit_code == 2


def test_a_wrong_trace_is_found_before_the_first_one_is_replayed(tmp_path: Path) -> None:
    result = program("zipf:requests=100000000", str(tmp_path / "nowhere.csv"))
    assert (result.returncode, result.stdout) == (1, "")
    assert "nowhere.csv" in result.stderr
