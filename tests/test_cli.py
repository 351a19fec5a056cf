from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_cache import AsyncLoraCache, __version__
from lora_cache.cli import app
from lora_cache.cli.output import human_bytes, human_seconds
from lora_cache.demo.catalogue import ADAPTERS, adapter_dir
from lora_cache.demo.run import traffic
from lora_cache.status import StatusFile
from lora_cache.testing import FakeEngine, FakeSource
from tests.real.engines import DEMO_MODEL
from tests.test_status import PERIOD_S, until_written


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("LORA_CACHE_STATUS_DIR", str(directory))
    return directory


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def load(result: Result) -> Any:
    return json.loads(result.stdout)


def python(*arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


# ---------------------------------------------------------------------- the program


def test_version() -> None:
    result = python("-m", "lora_cache", "--version")
    assert (result.returncode, result.stdout) == (0, f"lora-cache {__version__}\n")


def test_without_a_command_it_helps() -> None:
    result = invoke()
    assert all(
        command in result.output for command in ("demo", "pull", "ls", "verify", "prune", "status")
    )


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, lora_cache.cli; print({'torch', 'vllm', 'transformers'} & {*sys.modules})"
    assert python("-c", code).stdout == "set()\n"


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = invoke("ls", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_wrong_usage_exits_with_2() -> None:
    assert invoke("ls", "--no-such-option").exit_code == 2
    assert invoke("demo", "--requests", "0").exit_code == 2


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_cache.cli.status.read_status", interrupted)
    assert invoke("status").exit_code == 128 + signal.SIGINT


def test_sizes_and_times() -> None:
    sizes = [human_bytes(n) for n in (0, 1023, 1536, 737_280, 5 << 30, 3 << 40)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "720 KiB", "5.0 GiB", "3.0 TiB"]
    times = [human_seconds(s) for s in (0.4, 119, 300, 7200, 400_000)]
    assert times == ["0 s", "119 s", "5 min", "2 h", "5 d"]


# ---------------------------------------------------------------------- ls


def test_ls_shows_the_demo_adapters() -> None:
    rows = load(invoke("ls", "--json", str(adapter_dir("pirate").parent)))
    assert [row["name"] for row in rows] == sorted(ADAPTERS)
    for row in rows:
        recipe = ADAPTERS[row["name"]]
        assert (row["rank"], row["alpha"]) == (recipe.rank, recipe.alpha)
        assert row["target_modules"] == sorted(recipe.target_modules)
        assert row["key"].startswith("blake3:")
        assert len(row["key"]) == len("blake3:") + 64
        assert row["dtypes"] == ["BF16"]
        assert isinstance(row["bytes"], int)
        assert row["base_model"]
        assert row["error"] is None


def test_ls_as_a_table_for_people() -> None:
    result = invoke("ls", str(adapter_dir("yoda")))
    assert result.exit_code == 0
    header, row = result.stdout.splitlines()
    assert header.split()[:3] == ["name", "rank", "alpha"]
    assert "yoda" in row
    assert "KiB" in row
    assert "gate_proj up_proj" in row


def test_ls_tells_what_is_broken(tmp_path: Path) -> None:
    shutil.copytree(adapter_dir("pirate"), tmp_path / "good")
    broken = shutil.copytree(adapter_dir("robot"), tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "not an adapter").mkdir()

    result = invoke("ls", str(tmp_path), "--json")
    assert result.exit_code == 1
    bad, good = load(result)
    assert (good["name"], good["error"]) == ("good", None)
    assert bad["name"] == "broken"
    assert "safetensors" in bad["error"]

    shown = invoke("ls", str(tmp_path))
    assert shown.exit_code == 1
    assert "good" in shown.stdout
    assert "broken: " in shown.stdout


def test_ls_of_an_empty_directory(tmp_path: Path) -> None:
    assert invoke("ls", str(tmp_path)).exit_code == 0
    assert load(invoke("ls", str(tmp_path), "--json")) == []


def test_ls_takes_names_as_they_are(tmp_path: Path) -> None:
    shutil.copytree(adapter_dir("pirate"), tmp_path / "[red]x")
    (tmp_path / "\x1b[2Jboo").mkdir()
    (tmp_path / "\x1b[2Jboo" / "adapter_config.json").write_text("{}")
    result = invoke("ls", str(tmp_path))
    assert result.exit_code == 1
    assert "[red]x" in result.stdout
    assert "\x1b" not in result.stdout


# ---------------------------------------------------------------------- status


def test_status_without_a_cache() -> None:
    result = invoke("status")
    assert (result.exit_code, result.stdout) == (0, "no cache is running on this machine\n")
    assert load(invoke("status", "--json")) == []


def test_status_of_a_running_cache() -> None:
    async def main() -> tuple[Result, Result]:
        cache = AsyncLoraCache(FakeEngine(), sources={"fake": FakeSource()}, publish=False)
        async with cache, cache.lease(FakeSource.ref("held")):
            await cache.prefetch(FakeSource.ref("staged"))
            async with StatusFile(cache, period_s=PERIOD_S) as file:
                await until_written(file)
                return invoke("status"), invoke("status", "--json")

    shown, as_json = asyncio.run(main())
    lines = shown.stdout.splitlines()
    assert f"pid {os.getpid()}  fake engine, policy auto" in lines[0]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["gpu", "0", "held"],
        ["host", "staged", "8"],
    ]
    assert "slots 1/2, host memory 2/4 adapters, 2.0 MiB" in shown.stdout
    assert "1 requests: 0 slot hits, 0 host hits, 1 disk hits" in shown.stdout
    (record,) = load(as_json)
    assert record["stats"]["disk_hits"] == 1
    assert [a["name"] for a in record["snapshot"]["adapters"]] == ["held", "staged"]


# ---------------------------------------------------------------------- demo


def test_traffic_is_seeded_and_reaches_everybody() -> None:
    assert traffic(24, 1) == traffic(24, 1)
    assert traffic(24, 1) != traffic(24, 2)
    for requests in (1, 6, 25, 100):
        drawn = traffic(requests, seed=3)
        assert len(drawn) == requests
        assert len({adapter for adapter, _ in drawn}) == min(requests, 6)


def test_demo_without_vllm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cache.demo.run.find_spec", lambda name: None)
    result = invoke("demo", "--json")
    assert result.exit_code == 1
    assert "pip install 'lora-cache[demo]'" in result.stderr


def test_demo_refuses_an_unknown_policy_at_once() -> None:
    result = python("-m", "lora_cache", "demo", "--json", "--policy", "nonsense")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert "unknown policy 'nonsense'" in result.stderr


@pytest.mark.vllm
@DEMO_MODEL
@pytest.mark.timeout(600)
def test_demo() -> None:
    result = python("-m", "lora_cache", "demo", "--json", timeout=580)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["engine"], shown["policy"], shown["drift"]) == ("resident", "lru", 0)
    assert (shown["max_loras"], shown["max_cpu_loras"]) == (2, 4)
    hits = [shown["slot_hits"], shown["host_hits"], shown["disk_hits"]]
    assert min(hits) >= 1
    assert sum(hits) == shown["requests"] == len(shown["answers"])
    assert shown["evictions"] >= 1
    assert shown["seconds"] > 0
    assert shown["vllm"]
    assert {answer["adapter"] for answer in shown["answers"]} == set(ADAPTERS)
    for answer in shown["answers"]:
        assert answer["text"]
        assert answer["text"] != answer["base_text"]
