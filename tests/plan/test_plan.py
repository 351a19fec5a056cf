"""A whole plan: what is recommended, why, and what is said beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora_cache.errors import ConfigError
from lora_cache.plan import (
    EngineSettings,
    Plan,
    Ranks,
    SlotSettings,
    Verdict,
    Wishes,
    explain,
    in_directory,
    make_plan,
    of_ranks,
    read_model,
)
from lora_cache.plan.budget import GIB
from lora_cache.sim import open_trace, parse_hold
from tests.plan.configs import PUBLISHED, tiny, write_config
from tests.real.parts import write_adapter

TRACE = "zipf:adapters=40,requests=1500,rate=8,seed=1"
HOLD = parse_hold("0.02/token")


def plan_of(
    directory: Path,
    *,
    name: str = "Llama-3.1-8B",
    config: dict[str, Any] | None = None,
    rank: str | None = "16",
    adapters: Path | None = None,
    gib: float = 80,
    trace: str = TRACE,
    slots: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    like: str | None = None,
    **wishes: Any,
) -> Plan:
    model = read_model(write_config(directory, PUBLISHED[name][1] | (config or {})), like=like)
    served = of_ranks(Ranks.parse(rank), model, 2) if rank else None
    if adapters is not None:
        served = in_directory(adapters, 2)
    made = Wishes(
        gpu_bytes=int(gib * GIB),
        slots=SlotSettings(**{"max_lora_rank": 1, **(slots or {})}),
        engine=EngineSettings(**{"max_model_len": 4096, **(engine or {})}),
        **{"hold": HOLD, **wishes},
    )
    return make_plan(model, served, open_trace(trace), made)


def test_a_plan_for_a_known_case(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    shown = plan.to_dict()
    assert shown["bytes_per_slot"] == 92_356_608
    assert (shown["max_loras"], shown["max_lora_rank"]) == (32, 16)
    assert [row["wait_s"] <= 0.02 for row in shown["options"]] == [False] * 5 + [True] * 2
    assert shown["max_cpu_loras"] == 41, "the stock engine loads into one place more"
    assert shown["gpu_memory_utilization"] == 0.95
    assert [row["max_loras"] for row in shown["options"]] == [1, 2, 4, 8, 16, 32, 40]
    hits = [row["slot_hit_ratio"] for row in shown["options"]]
    assert hits == sorted(hits)
    for row in shown["options"]:
        total = row["kv_bytes"] + row["slot_bytes"] + shown["weight_bytes"]
        assert total + shown["working_bytes"] <= 80 * GIB * 0.95
    assert shown["kv_tokens"] * shown["kv_bytes_per_token"] == shown["kv_bytes"]


def test_arguments_are_those_that_vllm_has(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        slots={
            "tp": 2,
            "lora_dtype": "float16",
            "fully_sharded": True,
            "target_modules": ("q_proj",),
        },
        engine={"kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.8},
    )
    args = plan.vllm_args()
    assert args[:9] == [
        "--enable-lora", "--max-loras", str(plan.chosen.max_loras if plan.chosen else None),
        "--max-lora-rank", "16", "--max-cpu-loras", "41", "--gpu-memory-utilization", "0.8",
    ]  # fmt: skip
    assert args[-3:] == ["--fully-sharded-loras", "--lora-target-modules", "q_proj"]
    assert {"--tensor-parallel-size", "--kv-cache-dtype", "--lora-dtype"} <= set(args)
    assert plan.command() == " ".join(["vllm serve", str(tmp_path), *args])


@pytest.mark.vllm
def test_vllm_parses_the_arguments(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plan = plan_of(tmp_path, slots={"tp": 2, "target_modules": ("q_proj", "v_proj")})
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = EngineArgs.from_cli_args(
        parser.parse_args(["--model", str(tmp_path), *plan.vllm_args()])
    )
    chosen = plan.chosen
    assert chosen is not None
    assert (parsed.enable_lora, parsed.max_loras) == (True, chosen.max_loras)
    assert (parsed.max_lora_rank, parsed.max_cpu_loras) == (16, plan.max_cpu_loras)
    assert parsed.gpu_memory_utilization == plan.budget.utilization
    assert parsed.lora_target_modules == ["q_proj", "v_proj"]
    assert (parsed.tensor_parallel_size, parsed.max_model_len) == (2, 4096)
    assert (parsed.max_num_seqs, parsed.max_num_batched_tokens) == (256, 8192)


def test_the_resident_engine_uses_every_place(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, engine={"resident": True})
    assert plan.max_cpu_loras == 40
    assert plan.to_dict()["image_bytes"] == 4 * GIB
    assert plan_of(tmp_path).to_dict()["image_bytes"] == 0
    assert plan.budget.staging_bytes == plan.budget.slots.bytes_per_slot
    assert "staging" in "\n".join(explain(plan))
    waits = [option.wait_s for option in plan.options]
    stock = [option.wait_s for option in plan_of(tmp_path).options]
    assert sum(waits) < sum(stock)
    # With one or two, who is let in when decides, and loads hardly count.
    assert all(wait < other for wait, other in zip(waits[2:], stock[2:], strict=True))
    assert waits[-1] < stock[-1] / 2


def test_host_memory_limits_what_is_held(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, host_bytes=10 * 83_886_080 + 5)
    assert (plan.host_entries, plan.max_cpu_loras) == (10, 11)
    assert [option.max_loras for option in plan.options] == [1, 2, 4, 8, 10]
    assert "holds 10 of 40 adapters" in " ".join(plan.warnings)
    assert plan.options[-1].host_hits + plan.options[-1].slot_hits < 1
    two = plan_of(tmp_path, host_bytes=10 * 83_886_080, slots={"tp": 2})
    assert two.host_entries == 5, "each worker has a copy"
    with pytest.raises(ConfigError, match="holds no adapter"):
        plan_of(tmp_path, host_bytes=1000)


def test_numbers_of_slots_that_are_asked_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, max_loras=[12, 3, 3])
    assert [option.max_loras for option in plan.options] == [3, 12]
    for wrong in ([0], [41]):
        with pytest.raises(ConfigError, match="no more than the 40 adapters"):
            plan_of(tmp_path, max_loras=wrong)


def test_more_memory_never_means_fewer_slots(tmp_path: Path) -> None:
    chosen = []
    for gib in (17.5, 18, 18.5, 19, 20, 22, 24, 40, 80):
        plan = plan_of(tmp_path, gib=gib, trace="zipf:adapters=20,requests=400,rate=8")
        chosen.append(plan.chosen.max_loras if plan.chosen else 0)
    assert chosen == sorted(chosen)
    assert chosen[0] == 0 < chosen[-1]


# ---------------------------------------------------------------------- what is said beside it


def said(plan: Plan) -> str:
    return "\n".join(plan.warnings)


def test_prompts_without_graphs_are_told(tmp_path: Path) -> None:
    traffic = "zipf:adapters=20,requests=400,rate=8,input_tokens="
    text = said(plan_of(tmp_path, trace=traffic + "512"))
    assert re.search(r"one prompt in ten has 1,\d\d\d tokens or more", text)
    assert "for steps of up to 512:" in text
    assert "CUDA graphs" not in said(plan_of(tmp_path, trace=traffic + "100"))
    few = plan_of(tmp_path, trace=traffic + "100", engine={"max_num_seqs": 32})
    assert "for steps of up to 64:" in said(few)


def test_padding_is_told(tmp_path: Path) -> None:
    text = said(plan_of(tmp_path, rank="8:60,16:30,64:10"))
    assert "rank 8 in slots of rank 64: 87.5% of each such slot is padding (60%" in text
    assert "rank 16 in slots of rank 64: 75.0%" in text
    assert "10% of the adapters have rank 64; without them rank 16 would do" in text
    assert "88.1 MiB instead of 352.3 MiB" in text
    assert "padding" not in said(plan_of(tmp_path, rank="16"))


def test_slots_for_what_nobody_has(tmp_path: Path) -> None:
    assert "9% of each slot (8.1 MiB) is for embed_tokens and lm_head" in said(plan_of(tmp_path))
    narrow = plan_of(tmp_path, slots={"target_modules": ("q_proj", "v_proj")})
    assert "embed_tokens" not in said(narrow)
    assert "embed_tokens" not in said(plan_of(tmp_path, name="Mistral-7B-v0.1"))


def test_adapters_of_a_directory(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", {})
    adapters = tmp_path / "adapters"
    write_adapter(adapters / "a", rank=4)
    write_adapter(adapters / "b", rank=12)
    (write_adapter(adapters / "bad") / "adapter_model.safetensors").unlink()
    config = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    plan = plan_of(model, config=config, adapters=adapters, trace="zipf:adapters=2,requests=50")
    assert (plan.wishes.slots.max_lora_rank, plan.host_entries) == (16, 2)
    assert "bad cannot be served and is not counted" in said(plan)
    assert "which no adapter here has" in said(plan)
    narrow = plan_of(
        model,
        config=config,
        adapters=adapters,
        trace="zipf:adapters=2,requests=50",
        slots={"target_modules": ("k_proj",)},
    )
    assert "does not serve" not in said(plan)
    assert "does not serve" not in said(narrow), "one part of qkv_proj brings the others"
    other = plan_of(
        model,
        config=config,
        adapters=adapters,
        trace="zipf:adapters=2,requests=50",
        slots={"target_modules": ("o_proj",)},
    )
    assert "weights for q_proj, v_proj, which vLLM does not serve" in said(other)


def test_ranks_come_from_the_trace_or_are_assumed(tmp_path: Path) -> None:
    assert "nothing is known of the adapters" in said(plan_of(tmp_path, rank=None))
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,adapter,input_tokens,output_tokens,rank\n0,a,9,9,24\n1,b,9,9,8\n")
    plan = plan_of(tmp_path, rank=None, trace=str(trace))
    assert plan.wishes.slots.max_lora_rank == 32
    assert "nothing is known" not in said(plan)


def test_what_is_estimated_is_said(tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert "quantized (awq): their size is an estimate" in said(plan_of(tmp_path, config=quantized))
    assert "estimate" not in said(plan_of(tmp_path))
    other = plan_of(tmp_path, config={"architectures": ["FooForCausalLM"]}, like="LlamaForCausalLM")
    assert "FooForCausalLM is reckoned as LlamaForCausalLM: every figure" in said(other)
    assert "window" in said(plan_of(tmp_path, name="gemma-2-9b"))


def test_too_little_memory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, gib=16)
    assert plan.chosen is None
    assert set(plan.verdicts) == {Verdict.IMPOSSIBLE}
    assert "nothing fits" in said(plan)
    assert (plan.vllm_args(), plan.command()) == ([], "")
    assert plan.to_dict()["max_loras"] is None
    tight = plan_of(tmp_path, gib=19)
    assert tight.chosen is not None
    assert tight.chosen.max_loras == 1
    assert "requests will wait for it" in said(tight)


def test_waits_that_cannot_be_helped_and_contexts_too_long(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, target_wait_s=0.0, engine={"max_model_len": 600})
    assert "more than the 0 ms aimed at" in said(plan)
    assert "contexts end at 600" in said(plan)
    assert "made for contexts of up to 512 tokens" in said(plan)


# ---------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("slots", [{}, {"tp": 2, "fully_sharded": True}])
def test_the_explanation_adds_up(tmp_path: Path, name: str, slots: dict[str, Any]) -> None:
    """Whoever reckons the lines after gets their results."""
    plan = plan_of(tmp_path, name=name, slots=slots, trace="zipf:adapters=4,requests=100")
    lines = list(explain(plan))
    total = 0
    for line in lines:
        found = re.fullmatch(r"  \w[\w.]*: (\d+ × \(.*\)) = ([\d,]+) bytes", line)
        if found:
            formula = (
                found[1].replace("experts × ", "× ").replace("bytes", "").replace(" × ", " * ")
            )
            formula = re.sub(r"A ([^,]+), B ([^)]+)", r"\1 + \2", formula).replace("* *", "*")
            assert eval(formula) == int(found[2].replace(",", "")), line
            total += eval(formula)
    assert total == plan.budget.slots.bytes_per_slot
    assert f"  bytes_per_slot = {total:,}" in lines
    text = "\n".join(lines)
    assert plan.chosen is not None
    assert f"{plan.chosen.kv_tokens:,} tokens" in text
    assert f"{plan.needed_tokens:,} tokens" in text


def test_a_given_utilization_is_called_given(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, engine={"gpu_memory_utilization": 0.9, "working_bytes": GIB})
    text = "\n".join(explain(plan))
    assert "(given)" in text
    assert "an estimate" not in text


def test_tiny_models_have_plans_too(tmp_path: Path) -> None:
    for name in ("qwen2_moe", "gemma3"):
        model = read_model(tiny(tmp_path / name, name))
        made = Wishes(80 * GIB, SlotSettings(8), EngineSettings(max_model_len=512))
        plan = make_plan(model, None, open_trace("zipf:adapters=3,requests=30"), made)
        assert plan.chosen is not None
