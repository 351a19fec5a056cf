"""A packed and written slot is, to the last bit, the slot that vLLM's own loader fills."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cache.engines.resident.layout import Contents
from lora_cache.errors import CannotPackError
from tests.resident.engines import Rig
from tests.resident.parts import (
    ATTENTION,
    HIDDEN,
    LINEAR,
    MAX_LORAS,
    MAX_RANK,
    differing,
    module_name,
    slot_of,
    soil,
)

pytestmark = pytest.mark.vllm

Make = Callable[..., Rig]
Adapter = Callable[..., Path]

PATTERNS = {
    "ranks": {"q_proj": 4, "down_proj": 12},
    "rank_pattern": {"q_proj": 4, "down_proj": 12},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 7, "o_proj": 20},
}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaling of 1": {"lora_alpha": 8},
    "largest rank": {"rank": MAX_RANK},
    "rank 1": {"rank": 1},
    "odd rank, scaling 5/3": {"rank": 6, "lora_alpha": 10},
    "attention": {"targets": ATTENTION},
    "one slice of three": {"targets": ("k_proj",)},
    "two slices of three": {"targets": ("q_proj", "v_proj")},
    "one slice of two": {"targets": ("up_proj",), "rank": 3},
    "not packed": {"targets": ("down_proj", "o_proj")},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 12, "rank": 5},
    "patterns": PATTERNS,
    "patterns, rsLoRA": {**PATTERNS, "use_rslora": True},
    "bfloat16 file": {"dtype": "bfloat16", "lora_alpha": 11},
    "float16 file": {"dtype": "float16", "lora_alpha": 11},
    "tables": {"targets": ("embed_tokens", "lm_head", "q_proj"), "lora_alpha": 13},
    "tables only": {"targets": ("embed_tokens", "lm_head"), "rank": MAX_RANK},
    "a mixture's attention and router": {"targets": (*ATTENTION, "gate"), "lora_alpha": 5},
}
MOE = "a mixture's attention and router"
NO_TABLES = [name for name in CASES if not name.startswith("tables") and name != MOE]
GRID = [
    *(("llama", "bfloat16", name) for name in CASES if name != MOE),
    *(("llama", "float32", name) for name in CASES if name != MOE),
    *(("mistral", "bfloat16", name) for name in ("plain", "patterns", "rsLoRA")),
    *(("qwen2", "bfloat16", name) for name in NO_TABLES),
    *(("gemma", "bfloat16", name) for name in NO_TABLES),
    *(("mixtral", "bfloat16", name) for name in (MOE, "attention", "two slices of three")),
]


@pytest.mark.parametrize(("kind", "dtype", "case"), GRID, ids=map(", ".join, GRID))
def test_every_tensor_of_the_slot_equals_vllm_s(
    rig: Make, adapter: Adapter, kind: str, dtype: str, case: str
) -> None:
    engine = rig(kind, dtype)
    path = adapter(**CASES[case])
    expected = engine.native(path)
    image, contents = engine.image(path)
    for slot in range(MAX_LORAS):
        for other in range(MAX_LORAS):
            soil(engine.manager, other, seed=other)
        before = [slot_of(engine.manager, other) for other in range(MAX_LORAS)]
        assert set(differing(before[slot], expected)) == set(expected), "soiled to the last tensor"
        engine.writer.write(slot, image, contents)
        assert differing(slot_of(engine.manager, slot), expected) == []
        for other in set(range(MAX_LORAS)) - {slot}:
            assert differing(slot_of(engine.manager, other), before[other]) == []


@pytest.mark.parametrize(("kind", "case"), [("llama", "tables"), ("gemma", "plain")])
def test_an_image_is_no_larger_than_the_adapter(
    rig: Make, adapter: Adapter, kind: str, case: str
) -> None:
    """True rank, targeted modules only: the bytes of the file, in the slot's dtype."""
    image, contents = rig(kind).image(path := adapter(**CASES[case], dtype="bfloat16"))
    weights = (path / "adapter_model.safetensors").stat().st_size
    assert len(image) <= weights + 64 * len(rig(kind).layout.pieces)
    assert contents.rank == 8 < MAX_RANK


def test_what_belongs_to_layers_that_the_model_has_not_is_ignored(
    rig: Make, adapter: Adapter
) -> None:
    import torch

    engine = rig()
    extra = {
        f"{module_name(7, 'q_proj')}.lora_A.weight": torch.ones(4, HIDDEN),
        f"{module_name(7, 'q_proj')}.lora_B.weight": torch.ones(2 * HIDDEN, 4),
    }
    path = adapter(extra=extra)
    image, contents = engine.image(path)
    engine.writer.write(1, image, contents)
    assert differing(slot_of(engine.manager, 1), engine.native(path)) == []


def test_names_without_peft_s_prefix_are_the_same_modules(rig: Make, adapter: Adapter) -> None:
    from safetensors.torch import load_file, save_file

    engine = rig()
    path = adapter(lora_alpha=3)
    weights = path / "adapter_model.safetensors"
    expected, _ = engine.image(path)
    tensors = load_file(weights)
    save_file({k.removeprefix("base_model.model."): v for k, v in tensors.items()}, weights)
    image, contents = engine.image(path)
    assert bytes(image.numpy()) == bytes(expected.numpy())
    engine.writer.write(0, image, contents)
    assert differing(slot_of(engine.manager, 0), engine.native(path)) == []


def test_a_slot_that_held_a_larger_adapter_natively_keeps_nothing_of_it(
    rig: Make, adapter: Adapter
) -> None:
    engine = rig()
    large, small = adapter(seed=1, rank=MAX_RANK), adapter(seed=2, rank=2, targets=("v_proj",))
    request = engine.request(large)
    engine.worker.add_adapter(request)
    slot = engine.manager.lora_index_to_id.index(request.lora_int_id)
    engine.worker.remove_adapter(request.lora_int_id)
    assert any(bool(tensor.any()) for tensor in slot_of(engine.manager, slot).values())
    engine.writer.write(slot, *engine.image(small))
    assert differing(slot_of(engine.manager, slot), engine.native(small)) == []


def test_a_cleared_slot_holds_zeros_only(rig: Make) -> None:
    for kind in ("llama", "mixtral"):
        engine = rig(kind)
        soil(engine.manager, 1)
        engine.writer.clear(1)
        held = slot_of(engine.manager, 1)
        assert held
        assert not any(bool(tensor.any()) for tensor in held.values())


def test_two_adapters_differ_in_every_tensor_that_they_target(rig: Make, adapter: Adapter) -> None:
    engine = rig()
    one, two = (adapter(seed=seed, targets=ATTENTION) for seed in (1, 2))
    engine.writer.write(0, *engine.image(one))
    engine.writer.write(1, *engine.image(two))
    names = differing(slot_of(engine.manager, 0), slot_of(engine.manager, 1))
    attention = [name for name in slot_of(engine.manager, 0) if "self_attn" in name]
    assert sorted(names) == sorted(attention)


def test_one_wrong_byte_anywhere_is_seen(rig: Make, adapter: Adapter) -> None:
    engine = rig()
    path = adapter(targets=(*LINEAR, "embed_tokens", "lm_head"))
    expected = engine.native(path)
    image, contents = engine.image(path)
    rng = np.random.default_rng(0)
    placed = list(engine.layout.place(contents))
    assert len(placed) == len(engine.layout.pieces)
    for where in placed:
        rows, columns = where.shape
        byte = where.offset + int(rng.integers(rows * columns * engine.layout.item_bytes))
        image[byte] ^= 1
        engine.writer.write(2, image, contents)
        assert len(differing(slot_of(engine.manager, 2), expected)) in (1, 2)  # 2: a view of it
        image[byte] ^= 1
    engine.writer.write(2, image, contents)
    assert differing(slot_of(engine.manager, 2), expected) == []


def test_threads_may_write_different_slots_at_once(rig: Make, adapter: Adapter) -> None:
    engine = rig()
    paths = [adapter(seed=seed, rank=4 * seed + 3) for seed in range(MAX_LORAS)]
    expected = [engine.native(path) for path in paths]
    images = [engine.image(path) for path in paths]
    failures: list[str] = []

    def work(slot: int) -> None:
        for _ in range(30):
            engine.writer.write(slot, *images[slot])
            if differing(slot_of(engine.manager, slot), expected[slot]):
                failures.append(f"slot {slot}")

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(MAX_LORAS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_what_does_not_fit_is_refused_and_the_slot_left_alone(rig: Make, adapter: Adapter) -> None:
    import torch

    engine = rig()
    image, contents = engine.image(adapter())
    before = slot_of(engine.manager, 0)
    larger = Contents(MAX_RANK + 1, contents.present)
    for slot, given, what in (
        (-1, image, contents),
        (MAX_LORAS, image, contents),
        (0, image[:-1], contents),
        (0, image.view(torch.int8), contents),
        (0, image.reshape(-1, 64), contents),
        (0, torch.zeros(1 << 20, dtype=torch.uint8), larger),
    ):
        with pytest.raises(ValueError, match=r"slot|image"):
            engine.writer.write(slot, given, what)
    assert differing(slot_of(engine.manager, 0), before) == []


def test_experts_take_the_slow_path_and_leave_nothing_behind(rig: Make, adapter: Adapter) -> None:
    from lora_cache.engines.resident.native import load_native, write_native

    engine = rig("mixtral")
    experts = adapter(targets=("q_proj", "experts"), lora_alpha=11)
    with pytest.raises(CannotPackError, match="only vLLM's loader"):
        engine.image(experts)
    expected = engine.native(experts)
    enabled = [name for name in expected if "adapter_enabled" in name]
    assert enabled
    assert all(int(expected[name]) == 1 for name in enabled)
    manager = engine.manager
    books = (list(manager.lora_index_to_id), dict(manager._active_adapters.cache))
    loaded = load_native(engine.worker, engine.request(experts))
    for slot in range(MAX_LORAS):
        soil(manager, slot)
        others = [slot_of(manager, other) for other in range(MAX_LORAS) if other != slot]
        write_native(manager, slot, loaded)
        assert differing(slot_of(manager, slot), expected) == []
        now = [slot_of(manager, other) for other in range(MAX_LORAS) if other != slot]
        assert all(differing(*pair) == [] for pair in zip(others, now, strict=True))
    assert books == (list(manager.lora_index_to_id), dict(manager._active_adapters.cache))
    assert not manager.list_adapters()

    attention = adapter(targets=ATTENTION)
    engine.writer.write(1, *engine.image(attention))
    assert differing(slot_of(manager, 1), engine.native(attention)) == []
    assert not any(bool(slot_of(manager, 1)[name]) for name in enabled)


def test_the_slow_path_is_right_for_adapters_of_the_fast_one(rig: Make, adapter: Adapter) -> None:
    from lora_cache.engines.resident.native import load_native, write_native

    engine = rig()
    path = adapter(targets=("q_proj", "embed_tokens"), lora_alpha=11)
    soil(engine.manager, 2)
    write_native(engine.manager, 2, load_native(engine.worker, engine.request(path)))
    assert differing(slot_of(engine.manager, 2), engine.native(path)) == []
