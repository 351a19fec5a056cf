"""What the stock engine reads of vLLM's configuration, and which engines it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cache.engines.stock import StockEngine
from lora_cache.errors import ConfigError


class Target:
    """Looks like a `vllm.LLM` as far as its configuration goes."""

    def __init__(self, lora: dict[str, Any] | None = None, **parallel: Any) -> None:
        sleep = parallel.pop("enable_sleep_mode", False)
        settings = {"max_loras": 2, "max_cpu_loras": 5, "max_lora_rank": 16} | (lora or {})
        topology = {
            "data_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 1,
        } | parallel
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                lora_config=SimpleNamespace(**settings) if lora != {} else None,
                parallel_config=SimpleNamespace(**topology),
                model_config=SimpleNamespace(enable_sleep_mode=sleep, architectures=["Other"]),
            )
        )


def test_one_place_of_host_memory_is_kept_for_loading() -> None:
    capabilities = StockEngine(Target(tensor_parallel_size=2)).capabilities
    assert (capabilities.slots, capabilities.host_entries) == (2, 4)
    assert capabilities.tensor_parallel == 2


def test_too_few_places_cost_slots_and_are_said_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        capabilities = StockEngine(Target({"max_loras": 4, "max_cpu_loras": 4})).capabilities
    assert (capabilities.slots, capabilities.host_entries) == (3, 3)
    assert "set max_cpu_loras to 5 or more" in caplog.text


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target({}), "enable_lora=True"),
        (Target({"max_loras": 1, "max_cpu_loras": 1}), "max_loras \\+ 1"),
        (Target(data_parallel_size=2), "data_parallel_size"),
        (Target(pipeline_parallel_size=2), "pipeline_parallel_size"),
        (Target(nnodes=2), "several nodes"),
        (Target(_api_process_count=2), "api_server_count"),
        (Target(enable_sleep_mode=True), "enable_sleep_mode"),
    ],
    ids=["no lora", "no room", "dp", "pp", "nodes", "api servers", "sleep"],
)
def test_refused_engines(target: Target, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StockEngine(target)
