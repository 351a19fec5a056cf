"""``status --memory``: what a cache says it holds, against what is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_cache.cli import app
from lora_cache.cli.memory import account, show
from lora_cache.memory import GpuReading, Gpus
from lora_cache.plan import read_model
from lora_cache.plan.claims import Claims, claims_of
from lora_cache.testing import FakeEngine, FakeGpu, FakeNvml
from tests.test_status import leave_behind

GIB = 1 << 30
CLAIMS = {
    "gpus": 1,
    "slots": 3 * GIB,
    "bytes_per_slot": GIB,
    "weights": 15 * GIB,
    "kv_cache": 40 * GIB,
    "staging": GIB,
    "is_estimate": False,
    "unknown": None,
}
SNAPSHOT = {
    "engine": "resident",
    "policy": "lru",
    "slots": 3,
    "host_entries": 9,
    "host_bytes": 5 << 20,
    "host_bytes_max": None,
    "adapters": [],
    "at_s": 0.0,
    "evictions": [],
}


def read(*gpus: FakeGpu, **faults: int) -> GpuReading:
    nvml = FakeNvml(*gpus)
    for function, code in faults.items():
        nvml.fail(function, code)
    return Gpus(nvml, environ={}).read()


def books(reading: GpuReading, **claims: Any) -> dict[str, Any]:
    record = {"pid": os.getpid(), "claims": CLAIMS | claims, "snapshot": SNAPSHOT}
    return account(record, reading)


def text(made: dict[str, Any]) -> str:
    return "\n".join(str(line) for line in show(made))


def test_the_difference_is_what_nobody_claims() -> None:
    made = books(
        read(FakeGpu("GPU-a"), FakeGpu("GPU-b", processes={os.getpid(): 62 * GIB, 1: GIB}))
    )
    (gpu,) = made["gpus"]
    assert (gpu["index"], gpu["used_by_cache"], gpu["claimed"]) == (1, 62 * GIB, 59 * GIB)
    assert gpu["difference"] == 3 * GIB
    assert made["gpus_unknown"] is None
    shown = text(made)
    assert "on the GPU it holds: weights 15.0 GiB, slots 3.0 GiB (1.0 GiB each), KV cache" in shown
    assert "staging 1.0 GiB" in shown
    assert "its processes have 62.0 GiB: 3.0 GiB more than that" in shown
    assert "16.5 GiB of 80.0 GiB are free" in shown


def test_without_a_part_there_is_no_difference() -> None:
    made = books(read(FakeGpu("GPU-a", processes={os.getpid(): GIB})), kv_cache=None)
    assert (made["gpus"][0]["claimed"], made["gpus"][0]["difference"]) == (None, None)
    assert "KV cache unknown" in text(made)
    less = books(read(FakeGpu("GPU-a", processes={os.getpid(): GIB})))
    assert less["gpus"][0]["difference"] == -58 * GIB
    assert "−58.0 GiB more than that" in text(less)


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        (GpuReading(unknown="no driver"), "no driver"),
        (read(FakeGpu("GPU-a", processes={1: GIB})), "none of its processes is among those"),
        (read(FakeGpu("GPU-a"), nvmlDeviceGetComputeRunningProcesses_v3=4), "no permission"),
        (read(FakeGpu("GPU-a"), nvmlDeviceGetMemoryInfo=15), "the GPU is lost"),
    ],
)
def test_what_is_not_reported_is_said(reading: GpuReading, reason: str) -> None:
    made = books(reading)
    assert made["gpus"] == []
    assert reason in made["gpus_unknown"]
    assert reason in text(made)


def test_host_memory() -> None:
    host = books(GpuReading())["host"]
    assert os.getpid() in host["pids"]
    assert host["charged"] == 5 << 20
    assert host["difference"] == host["private"] + host["shared"] - (5 << 20) > 0
    assert host["available"] <= host["total"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_STATUS_DIR", str(tmp_path))
    stats = dict.fromkeys(
        ("requests", "slot_hits", "host_hits", "disk_hits", "evictions", "load_failures", "drift"),
        0,
    )
    name = f"{os.getpid()}-1.json"
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    leave_behind(tmp_path / "lora-cache", name, snapshot=SNAPSHOT, stats=stats, process_start=start)
    nvml = FakeNvml(FakeGpu("GPU-a", processes={os.getpid(): GIB}))
    monkeypatch.setattr("lora_cache.memory.nvml._import", lambda: nvml)
    shown = CliRunner().invoke(app, ["status", "--memory"])
    assert shown.exit_code == 0, shown.output
    assert "what it holds on GPUs is unknown: this engine says nothing" in shown.stdout
    assert "its processes have 1.0 GiB; 78.5 GiB of 80.0 GiB are free" in shown.stdout
    assert "left for all: " in shown.stdout
    (record,) = json.loads(CliRunner().invoke(app, ["status", "--memory", "--json"]).stdout)
    assert record["memory"]["gpus"][0]["used_by_cache"] == GIB
    (plain,) = json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)
    assert "memory" not in plain


# ---------------------------------------------------------------------- what it says it holds


def test_engines_without_vllm_claim_nothing() -> None:
    assert claims_of(FakeEngine()) is None


def test_a_configuration_that_is_not_understood_is_no_error() -> None:
    class Odd(FakeEngine):
        vllm_config = object()

    claims = claims_of(Odd())
    assert claims is not None
    assert claims.slots is None
    assert "not understood" in (claims.unknown or "")


@pytest.mark.vllm
def test_the_claims_of_a_real_engine(llm: Any, tiny_model: Path) -> None:
    from lora_cache.engines.stock import StockEngine
    from tests.plan.allocated import lora_bytes
    from tests.real.engines import MAX_LORAS

    claims = claims_of(StockEngine(llm))
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    slots = sum(lora_bytes(runner.lora_manager._adapter_manager))
    kv_cache = sum({t.data_ptr(): t.nbytes for t in runner.kv_caches}.values())
    # In float32 on CPUs vLLM repacks weights where they cannot be seen: test_exact.py has those.
    weights = read_model(tiny_model, dtype="float32").weight_bytes(1)
    assert claims == Claims(1, slots, slots // MAX_LORAS, weights, kv_cache)
