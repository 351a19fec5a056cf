from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_cache.bench.models import BUILT_IN, find_config, write_adapters, write_model
from lora_cache.bench.report import COLUMNS, markdown
from lora_cache.bench.run import SERVERS, Settings
from lora_cache.cli import app
from lora_cache.errors import ConfigError
from lora_cache.manifest import read_manifest

TINY = BUILT_IN["smollm2-135m"] | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "smollm2-135m",
        "adapter_bytes": 9_800_000,
        "settings": {"adapters": 20, "rank": 16, "slots": 4, "rate": 3, "seconds": 10, "seed": 0},
        "machine": "no GPU, 2 cores",
        "versions": {"lora-cache": "0", "vllm": "0.32.0"},
        "servers": rows,
    }


def test_the_table_is_markdown_that_lines_up() -> None:
    stock = {"server": "stock", "disk_ms": 205.4, "host_ms": 16.55, "slot_ms": 0.1513}
    lines = markdown(result([{"server": "ideal", "ttft_p50_ms": 88.0}, stock])).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert [line.count("|") for line in table] == [len(COLUMNS) + 1] * 4
    cells = [cell.strip() for cell in table[3].split("|")[1:-1]]
    assert cells[:5] == ["stock engine", "205", "–", "16.6", "0.151"]
    assert "20 adapters of rank 16 (9.8 MB), 4 slots, 3 requests/s for 10 s" in lines[0]
    assert lines[1] == "no GPU, 2 cores; lora-cache 0, vllm 0.32.0"


def test_bench_without_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cache.bench.small.find_spec", lambda name: None)
    done = invoke()
    assert done.exit_code == 1
    assert "pip install 'lora-cache[vllm]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--servers", "ideal,sglang"), "--servers sglang: choose from ideal, vllm"),
        (("--adapters", "8", "--slots", "8"), "--adapters 8: too few for 8 slots"),
        (("--model", "/nowhere"), "/nowhere: no config.json there"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cache.bench.small.find_spec", lambda name: object())
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}")


def test_only_plain_decoders_get_random_adapters(tmp_path: Path) -> None:
    write_model(tmp_path, {"architectures": ["MixtralForCausalLM"]})
    with pytest.raises(ConfigError, match="plain decoders"):
        find_config(str(tmp_path))
    write_model(tmp_path, {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ConfigError, match="lacks 'hidden_size'"):
        find_config(str(tmp_path))


def test_random_adapters_are_valid_and_distinct(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = write_adapters(tmp_path, TINY, 3, rank=4)
    manifests = [read_manifest(path) for path in made]
    assert {manifest.rank for manifest in manifests} == {4}
    files = {(path / "adapter_model.safetensors").read_bytes() for path in made}
    assert len(files) == 3


def test_adapters_are_shared_out() -> None:
    for settings in (Settings(), Settings(adapters=8, slots=3), Settings(adapters=100, slots=16)):
        left = settings.adapters - settings.busy - settings.slots - settings.arrivals
        assert settings.arrivals <= left <= settings.arrivals + 1
        assert 1 <= settings.busy <= settings.slots - 2


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_bench(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", TINY)
    command = [sys.executable, "-m", "lora_cache", "bench", "--json", "--model", str(model)]
    options = ["--adapters", "8", "--slots", "3", "--rank", "8", "--seconds", "1"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["server"]: row for row in found["servers"]}
    assert tuple(rows) == SERVERS
    for name in ("vllm", "stock", "resident"):
        row = rows[name]
        assert row["done"] == row["requests"]
        assert 0 < row["slot_ms"] < row["disk_ms"]
        assert min(row["host_ms"], row["gap_slot_ms"], row["gap_disk_ms"]) > 0
    assert rows["resident"]["packed_ms"] > 0
    assert rows["vllm"]["packed_ms"] is rows["stock"]["packed_ms"] is None
    assert {"lora-cache", "torch"} < found["versions"].keys()
    assert len(markdown(found).splitlines()) > 8
    assert "starting vLLM" in done.stderr
    # Nothing of what vLLM and its libraries say, also at the very end.
    noise = [line for line in done.stderr.splitlines() if not re.match(r" *\d+ s  ", line)]
    assert noise == []
