"""How many slots: never more memory than there is, never fewer slots with more of it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_cache.errors import ConfigError
from lora_cache.plan import (
    Budget,
    EngineSettings,
    Model,
    Option,
    SlotSettings,
    Verdict,
    make_budget,
    read_model,
)
from lora_cache.plan.budget import CONTEXT_BYTES, GIB, MOST_UTILIZATION, working_estimate
from lora_cache.plan.choice import candidates, choose
from lora_cache.plan.slots import packed_copies
from tests.plan.configs import ARCHITECTURES, PUBLISHED, TINY, write_config

ENGINE = EngineSettings(max_model_len=4096)


@cache
def model_of(name: str) -> Model:
    config = PUBLISHED[name][1] if name in PUBLISHED else TINY | ARCHITECTURES[name]
    with tempfile.TemporaryDirectory() as directory:
        return read_model(write_config(Path(directory), config))


def budget_of(name: str, gpu_bytes: int, **changes: Any) -> Budget:
    slots = SlotSettings(changes.pop("rank", 16), tp=changes.pop("tp", 1))
    return make_budget(model_of(name), slots, replace(ENGINE, **changes), gpu_bytes)


# ---------------------------------------------------------------------- the budget


def test_the_parts_add_up() -> None:
    budget = budget_of("Llama-3.1-8B", 80 * GIB)
    assert budget.utilization == MOST_UTILIZATION
    used = budget.weight_bytes + budget.working_bytes + budget.slots.nbytes(8)
    left = budget.vllm_bytes - used - budget.kv_bytes(8)
    assert 0 <= left < 16 * budget.kv_bytes_per_token, "less than a block is wasted"
    assert budget.kv_tokens(8) * budget.kv_bytes_per_token == budget.kv_bytes(8)


def test_what_is_outside_vllm_s_share_stays_free() -> None:
    for gib in (4, 8, 12, 24, 80):
        budget = budget_of("llama", gib * GIB)
        assert gib * GIB - budget.vllm_bytes >= CONTEXT_BYTES
    assert budget_of("llama", 80 * GIB, gpu_memory_utilization=0.5).utilization == 0.5
    with pytest.raises(ConfigError, match="no room for vLLM"):
        budget_of("llama", GIB // 2)


def test_the_resident_engine_keeps_room_for_one_adapter() -> None:
    stock, resident = (budget_of("Llama-3.1-8B", 80 * GIB, resident=r) for r in (False, True))
    assert (stock.staging_bytes, resident.staging_bytes) == (0, stock.slots.bytes_per_slot)
    assert resident.kv_bytes(7) == pytest.approx(stock.kv_bytes(8), abs=3 << 20)


def test_packed_images_are_divided_among_gpus() -> None:
    model = model_of("Llama-3.1-8B")
    slots = SlotSettings(16, tp=4)
    # By hand: in is 4096, q and o are 4096 wide, k and v 1024, gate, up and down 14336.
    whole_a, b = 5 * 4096, 4096 + 2 * 1024 + 2 * 14336  # q, k, v, gate, up
    a, whole_b = 4096 + 14336, 2 * 4096  # o, down
    by_hand = (4 * (whole_a + whole_b) + a + b) / (whole_a + whole_b + a + b)
    assert packed_copies(model, slots, ()) == pytest.approx(by_hand)
    assert packed_copies(model, replace(slots, tp=1), ()) == 1
    mixture = model_of("mixtral")
    assert packed_copies(mixture, replace(slots, tp=2), ()) == 2, "experts are not packed"
    assert packed_copies(mixture, replace(slots, tp=2), ["o_proj"]) < 2
    assert packed_copies(model, slots, ["down_proj"]) == pytest.approx(
        (14336 + 4 * 4096) / (14336 + 4096)
    )


def test_what_is_known_replaces_the_estimate() -> None:
    model = model_of("Llama-3.1-8B")
    assert budget_of("Llama-3.1-8B", 80 * GIB, working_bytes=5 * GIB).working_bytes == 5 * GIB
    assert budget_of("Llama-3.1-8B", 80 * GIB).working_bytes == working_estimate(model, 1, ENGINE)
    sizes = [working_estimate(model, 1, replace(ENGINE, max_num_seqs=n)) for n in (1, 256, 1024)]
    assert sizes[0] <= sizes[1] < sizes[2], "sampling many sequences at a time takes the most"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_model_len": 0},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": -1},
        {"gpu_memory_utilization": 1.5},
        {"gpu_memory_utilization": 0.0},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EngineSettings(**{"max_model_len": 10, **wrong})


def _gib(low: float, high: float) -> st.SearchStrategy[int]:
    return st.floats(low, high).map(lambda gib: int(gib * GIB))


@given(
    name=st.sampled_from([*ARCHITECTURES, "Llama-3.1-8B", "Qwen3-30B-A3B"]),
    gpu_bytes=_gib(1, 200),
    tp=st.sampled_from([1, 2]),
    rank=st.sampled_from([8, 64, 512]),
    max_loras=st.integers(1, 300),
    utilization=st.none() | st.floats(0.01, 1),
    resident=st.booleans(),
)
@settings(max_examples=300)
def test_a_budget_is_never_exceeded(
    name: str,
    gpu_bytes: int,
    tp: int,
    rank: int,
    max_loras: int,
    utilization: float | None,
    resident: bool,
) -> None:
    try:
        budget = budget_of(
            name,
            gpu_bytes,
            tp=tp,
            rank=rank,
            gpu_memory_utilization=utilization,
            resident=resident,
        )
    except ConfigError as error:
        assume("no room for vLLM" not in str(error))
        raise
    assert budget.vllm_bytes <= gpu_bytes * budget.utilization
    if utilization is None:
        assert budget.vllm_bytes + CONTEXT_BYTES <= gpu_bytes
    kv = budget.kv_bytes(max_loras)
    assert kv >= 0
    if kv:
        used = budget.weight_bytes + budget.slots.nbytes(max_loras) + kv + budget.working_bytes
        assert used + budget.staging_bytes <= gpu_bytes * budget.utilization
    assert budget.kv_bytes(max_loras + 1) <= kv, "another slot never leaves more"


# ---------------------------------------------------------------------- the choice


def option(max_loras: int, tokens: int, wait_s: float) -> Option:
    return Option(max_loras, 0, 0, tokens, 0.0, 0.0, 0.0, wait_s, None)


def chosen_of(options: list[Option], needed: int = 50, target_s: float = 0.02) -> int | None:
    chosen, verdicts = choose(options, needed, 10, target_s)
    assert len(verdicts) == len(options)
    assert [o for o, v in zip(options, verdicts, strict=True) if v is Verdict.CHOSEN] == (
        [chosen] if chosen else []
    )
    return chosen.max_loras if chosen else None


def test_as_few_slots_as_will_do() -> None:
    waits = {1: 9.0, 2: 1.0, 4: 0.019, 8: 0.002}
    options = [option(n, 100, wait_s) for n, wait_s in waits.items()]
    assert chosen_of(options) == 4
    assert chosen_of(options, target_s=0.001) == 8, "the best there is"
    assert chosen_of(options, target_s=10) == 1


def test_kv_cache_for_the_traffic_comes_first() -> None:
    options = [option(1, 90, 9.0), option(2, 60, 1.0), option(4, 40, 0.01), option(8, 5, 0.0)]
    assert chosen_of(options) == 2
    _, verdicts = choose(options, 50, 10, 0.02)
    assert verdicts == [Verdict.FEWER, Verdict.CHOSEN, Verdict.TIGHT, Verdict.IMPOSSIBLE]
    assert chosen_of(options, needed=1000) == 1, "too little whatever one does: lose no more"
    assert chosen_of([option(1, 5, 0.0)]) is None


def test_numbers_of_slots_to_try() -> None:
    assert candidates(1) == [1]
    assert candidates(6) == [1, 2, 4, 6]
    assert candidates(64) == [1, 2, 4, 8, 16, 32, 64]
    assert candidates(10_000) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


@given(
    waits=st.lists(st.floats(0, 100), min_size=1, max_size=9),
    slot=st.integers(1, 100),
    memory=st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
    needed=st.integers(0, 2000),
    least=st.integers(0, 500),
    target_s=st.floats(0, 10),
)
def test_more_memory_never_means_fewer_slots(
    waits: list[float],
    slot: int,
    memory: tuple[int, int],
    needed: int,
    least: int,
    target_s: float,
) -> None:
    def chosen(tokens: int) -> int:
        options = [
            option(1 << n, max(0, tokens - slot * (1 << n)), wait) for n, wait in enumerate(waits)
        ]
        found, _ = choose(options, max(needed, least), least, target_s)
        return found.max_loras if found else 0

    assert chosen(min(memory)) <= chosen(max(memory))
