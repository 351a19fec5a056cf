"""`bytes_per_slot` is what vLLM allocates, and weights are what it holds: to the byte."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cache.plan import MAX_LORA_RANKS, SlotSettings, read_model, slot_cost
from lora_cache.plan.architectures import KNOWN
from tests.plan.allocated import Build, lora_bytes, weight_bytes
from tests.plan.configs import ARCHITECTURES, PUBLISHED, tiny, write_config
from tests.real.engines import ALIVE, MAX_LORAS, TWO_WORKERS, engine_arguments

pytestmark = pytest.mark.vllm

RANK = 16


def expected(directory: Path, max_loras: int, dtype: str = "auto", **given: Any) -> int:
    """What we say: the slots and what is beside them, indices of batches left out."""
    settings = SlotSettings(**{"max_lora_rank": RANK, **given})
    cost = slot_cost(read_model(directory, dtype=dtype), settings)
    assert sum(nbytes for _, nbytes in cost.parts) == cost.bytes_per_slot
    return cost.nbytes(max_loras)


def test_every_known_architecture_is_compared() -> None:
    assert {made["architectures"][0] for made in ARCHITECTURES.values()} == set(KNOWN)


def test_the_ranks_are_those_that_vllm_takes() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == MAX_LORA_RANKS


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slots_and_weights(tmp_path: Path, build: Build, name: str, tp: int, sharded: bool) -> None:
    directory = tiny(tmp_path, name)
    for max_loras in (1, 4):
        found = build(
            directory,
            tp,
            max_loras=max_loras,
            max_lora_rank=RANK,
            fully_sharded_loras=sharded,
        )
        total = expected(directory, max_loras, tp=tp, fully_sharded=sharded)
        assert found.slots + found.reordering == total
        assert found.weights == read_model(directory).weight_bytes(tp)


def test_more_workers_than_heads_of_keys(tmp_path: Path, build: Build) -> None:
    directory = tiny(tmp_path, "qwen3", num_key_value_heads=1)
    found = build(directory, 2, max_loras=4, max_lora_rank=RANK)
    assert found.slots + found.reordering == expected(directory, 4, tp=2)
    assert found.weights == read_model(directory).weight_bytes(2)


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(tmp_path: Path, build: Build, name: str, tp: int) -> None:
    parameters, config = PUBLISHED[name]
    directory = write_config(tmp_path, config)
    model = read_model(directory)
    if tp > 1 and config["num_attention_heads"] % tp:
        pytest.skip("its heads cannot be divided")
    found = build(directory, tp, max_loras=2, max_lora_rank=64)
    total = expected(directory, 2, max_lora_rank=64, tp=tp)
    assert found.slots + found.reordering == total
    assert found.weights == model.weight_bytes(tp)
    if tp == 1:
        assert found.weights == 2 * parameters
        assert not model.is_estimate


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"lora_dtype": "float16"}, {"lora_dtype": "float16"}),
        ({"lora_target_modules": ["q_proj", "o_proj"]}, {"target_modules": ("q_proj", "o_proj")}),
        ({"lora_target_modules": ["lm_head"]}, {"target_modules": ("lm_head",)}),
        ({"lora_target_modules": ["qkv_proj"]}, {"target_modules": ("qkv_proj",)}),
    ],
    ids=str,
)
def test_settings(
    tmp_path: Path, build: Build, name: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    directory = tiny(tmp_path, name)
    found = build(directory, 2, max_loras=3, **theirs)
    assert found.slots + found.reordering == expected(directory, 3, tp=2, **ours)


def test_experts_are_chosen_as_a_whole(tmp_path: Path, build: Build) -> None:
    directory = tiny(tmp_path, "mixtral")
    found = build(directory, 1, max_loras=3, lora_target_modules=["experts", "gate"])
    assert found.slots == expected(directory, 3, target_modules=("experts", "gate"))


def test_a_float32_model_has_float32_slots(tmp_path: Path, build: Build) -> None:
    directory = tiny(tmp_path, "llama", torch_dtype="float32")
    found = build(directory, 1, max_loras=2, dtype="float32")
    assert found.slots == expected(directory, 2, "float32")
    assert found.weights == read_model(directory, dtype="float32").weight_bytes(1)


@given(
    name=st.sampled_from(["llama", "qwen2", "gemma2", "phi3", "mixtral", "qwen3_moe"]),
    tp=st.sampled_from([1, 2, 4]),
    heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    head=st.sampled_from([16, 32, 80]),
    hidden=st.integers(1, 5),
    inner=st.integers(1, 5),
    vocab=st.integers(1, 999),
    layers=st.integers(1, 4),
    rank=st.sampled_from([8, 64, 320]),
    max_loras=st.sampled_from([1, 4]),
    sharded=st.booleans(),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    build: Build,
    name: str,
    tp: int,
    heads: int,
    groups: int,
    head: int,
    hidden: int,
    inner: int,
    vocab: int,
    layers: int,
    rank: int,
    max_loras: int,
    sharded: bool,
) -> None:
    heads *= 4
    directory = tiny(
        tmp_path_factory.mktemp("shape"),
        name,
        num_attention_heads=heads,
        num_key_value_heads=heads // groups if (heads // groups) % tp == 0 else 4,
        head_dim=head,
        hidden_size=hidden * heads * 8,
        intermediate_size=inner * 64,
        vocab_size=vocab,
        num_hidden_layers=layers,
    )
    settings = {"max_lora_rank": rank, "fully_sharded_loras": sharded}
    found = build(directory, tp, max_loras=max_loras, **settings)
    total = expected(directory, max_loras, max_lora_rank=rank, tp=tp, fully_sharded=sharded)
    assert found.slots + found.reordering == total
    assert found.weights == read_model(directory).weight_bytes(tp)


# ---------------------------------------------------------------------- engines that run


@pytest.mark.parametrize("max_loras", [1, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "mixtral"])
def test_an_engine_that_runs(tmp_path: Path, name: str, max_loras: int) -> None:
    """The same on a real device, with weights, through the whole of vLLM."""
    from vllm import LLM
    from vllm.distributed import parallel_state

    if parallel_state._DP and not parallel_state._EP:
        parallel_state._EP = parallel_state._DP
    directory = tiny(tmp_path, name, vocab_size=256, head_dim=64, num_attention_heads=2)
    arguments = engine_arguments(
        directory,
        load_format="dummy",
        dtype="bfloat16",
        max_loras=max_loras,
        max_cpu_loras=max_loras,
        max_num_seqs=4,
        kv_cache_memory_bytes=8 << 20,
    )
    ALIVE.append(LLM(**arguments))
    executor = ALIVE[-1].llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    assert sum(lora_bytes(runner.lora_manager._adapter_manager)) == expected(directory, max_loras)
    assert weight_bytes(runner.model) == read_model(directory).weight_bytes(1)


@TWO_WORKERS
def test_two_workers_that_run(tiny_model: Path, two_workers: tuple[Any, asyncio.Runner]) -> None:
    target, runner = two_workers
    found = runner.run(target.collective_rpc("allocated"))
    weights = read_model(tiny_model, dtype="float32").weight_bytes(2)
    one = (expected(tiny_model, MAX_LORAS, "float32", tp=2), weights)
    assert [tuple(each) for each in found] == [one] * 2


def test_indices_of_a_batch(tmp_path: Path) -> None:
    """What vLLM keeps beside slots for the kernels, on CPUs and on GPUs."""
    import importlib.util

    import torch
    import vllm
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def held(thing: Any) -> int:
        return sum(t.nbytes for t in vars(thing).values() if torch.is_tensor(t))

    tokens, seqs, slots = 8192, 256, 8
    kernels = Path(vllm.__file__).parent / "lora/ops/triton_ops/lora_kernel_metadata.py"
    spec = importlib.util.spec_from_file_location("lora_kernel_metadata", kernels)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    on_gpu = held(module.LoRAKernelMeta.make(slots, tokens, "cpu"))
    on_both = held(PunicaWrapperCPU(tokens, seqs, "cpu"))
    model, slot_settings = read_model(tiny(tmp_path, "llama")), SlotSettings(RANK)
    cost = slot_cost(model, slot_settings, batched_tokens=tokens, seqs=seqs)
    assert 0 <= on_both + 2 * on_gpu - cost.fixed_bytes < 100 + 24 * slots
