"""``lora-cache plan``, as people and programs use it."""

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
from tests.plan.configs import ARCHITECTURES, PUBLISHED, TINY, tiny, write_config
from tests.real.parts import write_adapter

TRAFFIC = ("--trace", "zipf:adapters=12,requests=300,rate=8,seed=1")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def plan(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, *TRAFFIC, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_config(tmp_path / "model", PUBLISHED["Llama-3.1-8B"][1])


def test_json_is_one_object_with_what_programs_need(model: Path) -> None:
    found = plan(model, "--rank", "16", "--max-model-len", 4096)
    assert found["bytes_per_slot"] == 92_356_608
    assert found["max_lora_rank"] == 16
    assert found["max_loras"] in (1, 2, 4, 8, 12)
    assert found["max_cpu_loras"] == 13
    assert found["gpu_memory_utilization"] == 0.95
    args = found["vllm_args"]
    assert args[args.index("--max-loras") + 1] == str(found["max_loras"])
    assert found["is_estimate"] is False
    assert {"kv_bytes", "kv_tokens", "weight_bytes", "disk_bytes", "warnings"} <= found.keys()
    row = found["options"][0]
    assert {"max_loras", "slot_bytes", "kv_bytes", "slot_hit_ratio", "host_hit_ratio"} <= row.keys()
    assert {"wait_s", "verdict"} <= row.keys()


def test_options_change_what_they_say(model: Path) -> None:
    base = plan(model, "--rank", 16)
    half = plan(model, "--rank", 16, "--gpu-memory", "40GiB")
    assert half["gpu_bytes"] == 40 << 30 == base["gpu_bytes"] // 2
    two = plan(model, "--rank", 16, "--tp", 2)
    assert two["weight_bytes"] < base["weight_bytes"]
    assert two["bytes_per_slot"] < base["bytes_per_slot"]
    sharded = plan(model, "--rank", 16, "--tp", 2, "--fully-sharded-loras")
    assert sharded["bytes_per_slot"] < two["bytes_per_slot"]
    assert plan(model, "--rank", "8:90,64:10")["max_lora_rank"] == 64
    assert plan(model, "--rank", 8, "--max-lora-rank", 32)["max_lora_rank"] == 32
    narrow = plan(model, "--rank", 16, "--lora-target-modules", "q_proj,v_proj")
    assert narrow["vllm_args"][-3:] == ["--lora-target-modules", "q_proj", "v_proj"]
    assert plan(model, "--rank", 16, "--kv-cache-dtype", "fp8")["kv_bytes_per_token"] == 65536
    assert plan(model, "--rank", 16, "--dtype", "float32")["bytes_per_slot"] == 2 * 92_356_608
    assert plan(model, "--rank", 16, "--working-memory", "5GiB")["working_bytes"] == 5 << 30
    tried = [row["max_loras"] for row in plan(model, "--rank", 16, "--slots", "3,6")["options"]]
    assert tried == [3, 6]
    assert plan(model, "--engine", "resident")["max_cpu_loras"] == 12
    assert plan(model, "--gpu-memory-utilization", 0.5)["gpu_memory_utilization"] == 0.5
    assert plan(model, "--max-num-seqs", 2048)["working_bytes"] > base["working_bytes"]


def test_adapters_of_a_directory(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    for number in range(3):
        write_adapter(tmp_path / "adapters" / f"a{number}", rank=4 * (number + 1))
    result = invoke(model, "--adapters", tmp_path / "adapters", "--json")
    found = json.loads(result.stdout)
    assert (found["adapters"], found["max_lora_rank"]) == (3, 16)
    assert found["trace"] == "zipf:adapters=3,requests=20000,rate=8"
    assert found["rank_padding"] == 0.5


def test_a_table_for_people(model: Path) -> None:
    result = invoke(model, "--rank", "8:98,64:2", "--max-model-len", 4096, *TRAFFIC)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "LlamaForCausalLM in bfloat16, on one GPU of 80.0 GiB" in lines[0]
    assert "a slot of rank 64 352 MiB (369,426,432 bytes)" in lines[1]
    assert lines[2].endswith("300 requests for 12 adapters, 8.25 a second")
    header = next(number for number, line in enumerate(lines) if line.startswith("slots"))
    rows = lines[header + 1 : header + 6]
    assert [row.split()[0] for row in rows] == ["1", "2", "4", "8", "12"]
    assert sum("← chosen" in row for row in rows) == 1
    assert any(line.startswith("max_lora_rank") and "8 (98%), 64 (2%)" in line for line in lines)
    assert any(line.startswith("note: rank 8 in slots of rank 64: 87.5%") for line in lines)
    assert lines[-1].startswith(f"vllm serve {model} --enable-lora --max-loras ")


def test_the_arithmetic(model: Path) -> None:
    result = invoke(model, "--rank", 16, "--explain", *TRAFFIC)
    assert "  qkv_proj: 32 × ((A 3 × 16 × 4096, B 4096 × 16 + 2 × 1024 × 16) × 2)" in result.stdout
    assert "bytes_per_slot = 92,356,608" in result.stdout
    assert "KV cache per token = 2 (keys, values) × 32 layers × 8 of 8 heads × 128" in result.stdout


def test_the_resident_engine_keeps_images_on_disk(model: Path) -> None:
    result = invoke(model, "--rank", 16, "--engine", "resident", *TRAFFIC)
    assert any(line.split()[:2] == ["image_bytes", "2GiB"] for line in result.stdout.splitlines())
    assert "image_bytes" not in invoke(model, "--rank", 16, *TRAFFIC).stdout


def test_what_does_not_fit_exits_with_one(model: Path) -> None:
    for extra in ((), ("--json",)):
        result = invoke(model, "--gpu-memory", "16GiB", *TRAFFIC, *extra)
        assert result.exit_code == 1
        assert "nothing fits" in result.stdout
        assert "vllm serve" not in result.stdout


@pytest.mark.long
def test_it_needs_neither_vllm_nor_torch_and_repeats_itself(model: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['vllm'] = sys.modules['pynvml'] = None\n"
        "from lora_cache.cli import main; sys.argv[0] = 'lora-cache'; main()"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, "plan", str(model), *TRAFFIC],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert outputs[0].stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dir}/nowhere"], "no config.json there"),
        (["{dir}/broken"], "is not JSON"),
        (["{dir}/unknown"], "DeepseekV3ForCausalLM is not known here"),
        (["{dir}/unknown", "--like", "Foo"], "Foo is not known here"),
        (["{dir}/llama", "--tp", "3"], "cannot be divided among 3 GPUs"),
        (["{dir}/llama", "--rank", "600"], "ranks up to 512"),
        (["{dir}/llama", "--rank", "8;9"], "write 16, or 8,16,64"),
        (["{dir}/llama", "--max-lora-rank", "24"], "max_lora_rank 24: vLLM takes 1, 8"),
        (["{dir}/llama", "--gpu-memory", "1MiB"], "no room for vLLM"),
        (["{dir}/llama", "--gpu-memory-utilization", "95"], "it is a share"),
        (["{dir}/llama", "--host-memory", "1KiB"], "holds no adapter"),
        (["{dir}/llama", "--slots", "0"], "at least one"),
        (["{dir}/llama", "--slots", "many"], "give numbers"),
        (["{dir}/llama", "--trace", "{dir}/no.csv"], "no such file"),
        (["{dir}/llama", "--hold", "long"], "hold is 'long'"),
        (["{dir}/llama", "--policy", "mru"], "unknown policy 'mru'"),
        (["{dir}/llama", "--engine", "other"], "choose stock or resident"),
        (["{dir}/llama", "--dtype", "int3"], "dtype 'int3'"),
        (["{dir}/llama", "--lora-dtype", "int3"], "lora_dtype 'int3'"),
        (["{dir}/llama", "--kv-cache-dtype", "int3"], "KV cache dtype 'int3'"),
        (["{dir}/llama", "--lora-target-modules", "wq"], "target module 'wq'"),
        (["{dir}/llama", "--adapters", "{dir}/llama"], "holds no adapter that can be served"),
        (["{dir}/llama", "--adapters", "{dir}/nowhere"], "nowhere"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
def test_errors_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, as_json: bool
) -> None:
    tiny(tmp_path / "llama", "llama")
    unknown = TINY | ARCHITECTURES["llama"] | {"architectures": ["DeepseekV3ForCausalLM"]}
    write_config(tmp_path / "unknown", unknown)
    write_config(tmp_path / "broken", {}).joinpath("config.json").write_text("{")
    filled = [argument.replace("{dir}", str(tmp_path)) for argument in arguments]
    if "--trace" not in filled:
        filled += TRAFFIC
    result = invoke(*filled, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--gpu-memory", "large"],
        ["x", "--tp", "0"],
        ["x", "--rank", "8", "--adapters", "y"],
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    model = tiny(tmp_path, "llama")
    result = invoke(*[str(model) if argument == "x" else argument for argument in arguments])
    assert result.exit_code == 2
