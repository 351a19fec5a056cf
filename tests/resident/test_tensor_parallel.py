"""Slots of a tensor-parallel worker, without a second worker.

The layers are vLLM's own, built in one process as rank r of n; what they would send each other is
not called.  vLLM's loader fills one slot of them, the packer and the writer another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cache.errors import CannotPackError
from lora_cache.manifest import read_manifest
from lora_cache.plan import SlotSettings, read_model
from lora_cache.plan.slots import packed_copies
from tests.resident.engines import Rig
from tests.resident.parts import (
    HEAD,
    HIDDEN,
    INNER,
    LAYERS,
    LINEAR,
    MAX_LORAS,
    MAX_RANK,
    VOCAB,
    differing,
    module_name,
    slot_of,
    soil,
    write_model,
)

pytestmark = pytest.mark.vllm

SPLIT = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FUSED = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}
WORLDS = [(rank, 2, sharded) for rank in range(2) for sharded in (False, True)]


class Worker:
    """What `describe`, the writer and vLLM's loader need of a worker manager."""

    def __init__(self, rank: int, size: int, sharded: bool, packed: dict[str, list[str]]) -> None:
        import torch
        from vllm.config.lora import LoRAConfig
        from vllm.lora.model_manager import LoRAModelManager

        config = LoRAConfig(
            max_lora_rank=MAX_RANK, max_loras=MAX_LORAS, fully_sharded_loras=sharded
        )
        config.lora_dtype = torch.bfloat16
        manager: Any = object.__new__(LoRAModelManager)
        manager.model = torch.nn.Module()
        manager.lora_config = config
        manager.vocab_size = VOCAB
        manager.is_pooling_model = manager._is_non_gated_moe = manager._is_moe = False
        manager._enable_moe_shared_loras = manager._enable_mixed_moe_lora_format = False
        manager.packed_modules_mapping, manager.packed_modules, manager.modules = packed, {}, {}
        manager.supported_lora_modules = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
        manager.lora_index_to_id = [None] * MAX_LORAS
        manager._active_adapters = {}
        self.manager, self.config = manager, config
        with pytest.MonkeyPatch.context() as patch:
            for module in ("linear", "vocab_parallel_embedding"):
                where = f"vllm.model_executor.layers.{module}.get_tensor_model_parallel"
                patch.setattr(f"{where}_rank", lambda: rank)
                patch.setattr(f"{where}_world_size", lambda: size)
            for layer in range(LAYERS):
                self._add_layers(layer, packed)

    def _add_layers(self, layer: int, packed: dict[str, list[str]]) -> None:
        from vllm.lora.utils import from_layer
        from vllm.model_executor.layers import linear

        prefix = f"model.layers.{layer}"
        merged = linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False)
        bases = {
            f"{prefix}.self_attn.qkv_proj": linear.QKVParallelLinear(
                HIDDEN, HEAD, 2, 1, bias=False
            ),
            f"{prefix}.self_attn.o_proj": linear.RowParallelLinear(2 * HEAD, HIDDEN, bias=False),
            f"{prefix}.mlp.gate_up_proj": merged,
            f"{prefix}.mlp.down_proj": linear.RowParallelLinear(INNER, HIDDEN, bias=False),
        }
        for name, base in bases.items():
            members = packed.get(name.rpartition(".")[2], [])
            wrapped = from_layer(base, MAX_LORAS, self.config, members)
            assert hasattr(wrapped, "lora_a_stacked"), name
            self.manager.modules[name] = wrapped
            self.manager._register_packed_modules(name)

    def _load_adapter(self, path: Path) -> Any:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        expected: set[str] = set()
        for name in self.manager.supported_lora_modules:
            expected.update(self.manager.packed_modules_mapping.get(name, [name]))
        return LoRAModel.from_local_checkpoint(
            str(path),
            expected,
            PEFTHelper.from_local_dir(str(path), None),
            lora_model_id=1,
            device="cpu",
            dtype=self.config.lora_dtype,
            model_vocab_size=VOCAB,
        )

    @property
    def _adapter_manager(self) -> Any:
        return self.manager


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "largest rank": {"rank": MAX_RANK, "lora_alpha": 11},
    "a rank that only the first worker holds": {"rank": 3, "lora_alpha": 5},
    "a rank that the second worker holds one of": {"rank": 9},
    "partial": {"targets": ("k_proj", "up_proj", "o_proj")},
    "patterns": {
        "ranks": {"q_proj": 12, "down_proj": 2},
        "rank_pattern": {"q_proj": 12, "down_proj": 2},
    },
}


@pytest.fixture
def make_worker(rig: Callable[..., Rig]) -> Callable[..., Worker]:
    from vllm.config import VllmConfig, set_current_vllm_config

    rig()  # its process groups are what the layers ask for at birth

    def make(*arguments: Any) -> Worker:
        with set_current_vllm_config(VllmConfig()):
            return Worker(*arguments)

    return make


def compare(worker: Worker, path: Path) -> None:
    """vLLM's loader into slot 0, ours into slot 1."""
    import torch

    from lora_cache.engines.resident.describe import describe
    from lora_cache.engines.resident.native import load_native, write_native
    from lora_cache.engines.resident.packing import examine, pack
    from lora_cache.engines.resident.slots import SlotWriter

    layout = describe(worker.manager)
    assert layout.resets == ()
    for slot in range(MAX_LORAS):
        soil(worker.manager, slot, slot)
    before = slot_of(worker.manager, 2)
    write_native(worker.manager, 0, load_native(worker, path))
    contents = examine(layout, path)
    image = bytearray(layout.nbytes(contents))
    assert pack(layout, path, image) == contents
    flat = torch.frombuffer(image, dtype=torch.uint8)
    SlotWriter(worker.manager, layout).write(1, flat, contents)
    expected = slot_of(worker.manager, 0)
    assert any(bool(tensor.any()) for tensor in expected.values())
    assert differing(slot_of(worker.manager, 1), expected) == []
    assert differing(slot_of(worker.manager, 2), before) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rank", "size", "sharded"), WORLDS)
def test_each_rank_s_share_is_vllm_s(
    make_worker: Callable[..., Worker],
    adapter: Callable[..., Path],
    rank: int,
    size: int,
    sharded: bool,
    case: str,
) -> None:
    compare(make_worker(rank, size, sharded, SPLIT), adapter(**CASES[case]))


@pytest.mark.parametrize(("rank", "size", "sharded"), WORLDS)
def test_fused_projections_are_cut_by_halves_and_heads(
    make_worker: Callable[..., Worker],
    adapter: Callable[..., Path],
    rank: int,
    size: int,
    sharded: bool,
) -> None:
    """Phi-3 has one matrix for queries, keys and values, and one for gate and up."""
    import torch

    generator = torch.Generator().manual_seed(0)
    extra = {}
    for layer in range(LAYERS):
        for name, width in (("self_attn.qkv_proj", 4 * HEAD), ("mlp.gate_up_proj", 2 * INNER)):
            where = f"base_model.model.model.layers.{layer}.{name}"
            extra[f"{where}.lora_A.weight"] = torch.randn(4, HIDDEN, generator=generator)
            extra[f"{where}.lora_B.weight"] = torch.randn(width, 4, generator=generator)
    compare(make_worker(rank, size, sharded, FUSED), adapter(rank=4, targets=(), extra=extra))


def test_ranks_take_different_shares_and_have_different_digests(
    make_worker: Callable[..., Worker],
) -> None:
    from lora_cache.engines.resident.describe import describe

    layouts = [describe(make_worker(*world, SPLIT).manager) for world in WORLDS]
    assert [(layout.tp_rank, layout.tp_size) for layout in layouts] == [w[:2] for w in WORLDS]
    assert [layout.fully_sharded for layout in layouts] == [w[2] for w in WORLDS]
    assert len({layout.digest for layout in layouts}) == len(WORLDS)
    first, second = (
        next(p for p in layout.pieces if p.module.endswith("o_proj") and p.matrix == "A")
        for layout in layouts[::2]
    )
    assert (first.spans, second.spans) == (((0, HEAD),), ((HEAD, 2 * HEAD),))
    keys = [
        next(
            p
            for p in layout.pieces
            if p.module.endswith("qkv_proj") and p.matrix == "B" and p.index == 1
        )
        for layout in layouts[::2]
    ]
    assert [piece.spans for piece in keys] == [((0, HEAD),)] * 2, "one key head, held by both"
    ranks = [layout.pieces[0] for layout in layouts[1::2]]
    assert [(p.rank_start, p.rank_stop) for p in ranks] == [(0, 8), (8, 16)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("targets", [LINEAR, ("o_proj", "down_proj"), ("up_proj", "gate_proj")])
def test_lora_cache_plan_knows_what_the_images_of_all_take(
    make_worker: Callable[..., Worker],
    adapter: Callable[..., Path],
    tmp_path: Path,
    targets: tuple[str, ...],
    sharded: bool,
) -> None:
    from lora_cache.engines.resident.charges import Charges
    from lora_cache.engines.resident.describe import describe

    workers = [describe(make_worker(rank, 2, sharded, SPLIT).manager) for rank in range(2)]
    manifest = read_manifest(adapter(rank=MAX_RANK, targets=targets, dtype="bfloat16"))
    model = read_model(write_model(tmp_path / "model", "llama"))
    slots = SlotSettings(MAX_RANK, tp=2, fully_sharded=sharded)
    copies = packed_copies(model, slots, targets)
    assert 1 <= copies < 2
    assert Charges(workers).of(manifest) == round(manifest.nbytes * copies)


def test_an_adapter_of_another_width_is_left_to_vllm(
    make_worker: Callable[..., Worker], adapter: Callable[..., Path]
) -> None:
    import torch

    from lora_cache.engines.resident.describe import describe
    from lora_cache.engines.resident.packing import examine

    layout = describe(make_worker(1, 2, False, SPLIT).manager)
    for target in LINEAR:
        name = module_name(0, target)
        path = adapter(
            targets=(),
            extra={
                f"{name}.lora_A.weight": torch.ones(2, HIDDEN // 2),
                f"{name}.lora_B.weight": torch.ones(HEAD // 2, 2),
            },
        )
        with pytest.raises(CannotPackError, match="wide, the model has"):
            examine(layout, path)
