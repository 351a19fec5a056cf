"""What the packer writes, and what it leaves to vLLM's loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cache.engines.resident.names import Renames, is_skipped, parse_name
from lora_cache.errors import CannotPackError, EngineError, InvalidAdapterError
from tests.resident.layouts import plain_layout
from tests.resident.parts import HIDDEN, MAX_RANK, VOCAB, module_name

pytest.importorskip("torch")

import torch

from lora_cache.engines.resident.packing import examine, pack

Adapter = Callable[..., Path]


def packed(path: Path, fill: int = 0, **changes: Any) -> np.ndarray[Any, Any]:
    layout = plain_layout(**changes)
    out = np.full(layout.nbytes(examine(layout, path)), fill, np.uint8)
    pack(layout, path, out)
    return out


def test_the_formula_by_hand(adapter: Adapter) -> None:
    """A as it is; B cast to the slot's dtype, then multiplied by alpha / rank, there."""
    from safetensors.torch import load_file

    path = adapter(rank=3, lora_alpha=5, targets=("v_proj",))
    weights = load_file(path / "adapter_model.safetensors")
    out = torch.from_numpy(packed(path)).view(torch.bfloat16)
    a = weights[f"{module_name(0, 'v_proj')}.lora_A.weight"].to(torch.bfloat16)
    b = weights[f"{module_name(0, 'v_proj')}.lora_B.weight"].to(torch.bfloat16) * (5 / 3)
    assert torch.equal(out[: a.numel()].view(a.shape), a)
    start = -(-a.numel() // 32) * 32
    assert torch.equal(out[start : start + b.numel()].view(b.shape), b)


def test_equal_adapters_give_equal_bytes_whatever_was_in_the_buffer(adapter: Adapter) -> None:
    path = adapter(rank=3, rank_pattern={"q_proj": 1}, ranks={"q_proj": 1})
    assert bytes(packed(path, fill=0)) == bytes(packed(path, fill=0xFF))


def test_what_lies_behind_the_image_is_left_alone(adapter: Adapter) -> None:
    layout, path = plain_layout(), adapter()
    nbytes = layout.nbytes(examine(layout, path))
    out = bytearray(b"\x5a" * (nbytes + 100))
    pack(layout, path, out)
    assert out[nbytes:] == b"\x5a" * 100
    assert bytes(out[:nbytes]) == bytes(packed(path))


def test_a_buffer_that_is_too_small_is_refused(adapter: Adapter) -> None:
    layout, path = plain_layout(), adapter()
    with pytest.raises(ValueError, match="the image has"):
        pack(layout, path, bytearray(layout.nbytes(examine(layout, path)) - 1))


def test_a_smaller_module_is_padded_with_positive_zeros(adapter: Adapter) -> None:
    path = adapter(
        rank=4, targets=("q_proj",), ranks={"q_proj": 2}, rank_pattern={"q_proj": 2}, lora_alpha=-4
    )
    out = packed(path)
    assert examine(plain_layout(), path).rank == 2, "the rank that is there, not the configured one"
    assert out.any()
    larger = adapter(rank=4, targets=("q_proj", "v_proj"), ranks={"q_proj": 2}, lora_alpha=-4)
    image = torch.from_numpy(packed(larger)).view(torch.int16)
    assert not image[2 * HIDDEN : 4 * HIDDEN].any(), "rows 2 and 3 of the first A"
    b = image[4 * HIDDEN : 8 * HIDDEN].view(HIDDEN, 4)
    assert b[:, :2].any()
    assert not b[:, 2:].any(), "not even a sign"


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rank": ({"rank": MAX_RANK + 1}, {}, "max_lora_rank"),
    "rank_pattern": ({"rank_pattern": {"x": MAX_RANK + 1}}, {}, "max_lora_rank"),
    "old vLLM": ({"alpha_pattern": {"q_proj": 2}}, {"honours_patterns": False}, "ignores"),
    "regular expression": ({"rank_pattern": {"^a|b$": 2}}, {}, "more than a name"),
    "whole modules": ({"modules_to_save": ["score"]}, {}, "whole modules"),
    "DoRA": ({"use_dora": True}, {}, "DoRA"),
    "biases": ({"bias": "all"}, {}, "biases"),
    "pooling": ({}, {"refusal": "pooling"}, "pooling"),
    "tables": ({"targets": ("embed_tokens",)}, {}, "no module"),
    "experts": ({"targets": ("experts",)}, {}, "only vLLM's loader"),
    "slow": ({}, {"slow": ("model.layers.0.self_attn",), "sources": ("x",) * 14}, "only vLLM's"),
    "nothing known": ({"targets": ()}, {}, "no LoRA weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_know_is_left_to_vllm(adapter: Adapter, name: str) -> None:
    arguments, changes, message = REFUSED[name]
    extra = {"x.embed_tokens.base_layer.weight": torch.zeros(1)} if name == "nothing known" else {}
    path = adapter(**arguments, extra=extra)
    with pytest.raises(CannotPackError, match=message):
        examine(plain_layout(**changes), path)
    assert issubclass(CannotPackError, EngineError)


A, B = "lora_A.weight", "lora_B.weight"
Q = module_name(0, "q_proj")
MISFITS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "half": ({f"{Q}.{A}": (4, HIDDEN)}, "but one"),
    "ranks": ({f"{Q}.{A}": (4, HIDDEN), f"{Q}.{B}": (HIDDEN, 5)}, "do not match"),
    "dimensions": ({f"{Q}.{A}": (4, HIDDEN, 1), f"{Q}.{B}": (HIDDEN, 4)}, "do not match"),
    "narrow": ({f"{Q}.{A}": (4, HIDDEN - 1), f"{Q}.{B}": (HIDDEN, 4)}, "A is 127 wide"),
    "long": ({f"{Q}.{A}": (4, HIDDEN), f"{Q}.{B}": (HIDDEN + 1, 4)}, "B is 129 wide"),
    "large": ({f"{Q}.{A}": (17, HIDDEN), f"{Q}.{B}": (HIDDEN, 17)}, "does not fit"),
    "twice": (
        {f"{Q}.{A}": (4, HIDDEN), f"{Q[17:]}.{A}": (4, HIDDEN), f"{Q}.{B}": (HIDDEN, 4)},
        "twice",
    ),
    "bias": ({f"{Q}.{A}": (4, HIDDEN), f"{Q}.lora_B.bias": (HIDDEN,)}, "no LoRA matrix"),
    "DoRA's vector": ({f"{Q}.lora_magnitude_vector": (HIDDEN,)}, "no LoRA matrix"),
    "unknown module": ({"base_model.model.x.y.lora_A.weight": (4, 4)}, "no module"),
    "vocabulary": ({"base_model.model.e.lora_embedding_A": (4, VOCAB + 1)}, "vocabulary"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misshapen_weights_are_left_to_vllm(adapter: Adapter, name: str) -> None:
    shapes, message = MISFITS[name]
    extra = {key: torch.ones(shape) for key, shape in shapes.items()}
    path = adapter(targets=(), extra=extra, target_modules=["q_proj"])
    layout = plain_layout()
    if name == "vocabulary":
        layout = plain_layout(sources=("e", *layout.sources[1:]))
    with pytest.raises(CannotPackError, match=message):
        pack(layout, path, bytearray(1 << 20))


def test_damaged_files_are_named(adapter: Adapter) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = adapter()
        (path / name).write_bytes(b"{" * 100)
        with pytest.raises((InvalidAdapterError, CannotPackError), match=name):
            examine(plain_layout(), path)


def test_a_float_alpha_is_a_float_alpha(adapter: Adapter) -> None:
    path = adapter(lora_alpha=1)
    config = json.loads((path / "adapter_config.json").read_text())
    whole = packed(path)
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1.0}))
    assert bytes(packed(path)) == bytes(whole)
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1.5}))
    assert bytes(packed(path)) != bytes(whole)


def test_renamed_modules_find_their_place(adapter: Adapter) -> None:
    layout = plain_layout()
    renames = Renames(prefix=(("model.", "language_model.model."),))
    moved = tuple(f"language_{s.replace('model.', 'model.model.', 1)}" for s in layout.sources)
    path = adapter()
    assert bytes(packed(path, sources=moved, renames=renames)) == bytes(packed(path))


NAMES = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.base_model.model.layers.0.mlp.gate_proj.lora_B.weight",
    "model.language_model.layers.1.mlp.up_proj.lora_B.weight",
    "base_model.model.visual.blocks.3.attn.qkv.lora_A.weight",
    "base_model.model.model.visual.merger.mlp.0.lora_A.weight",
    "base_model.model.model.embed_tokens.lora_embedding_A",
    "base_model.model.lm_head.lora_B.weight",
    "base_model.model.lora_A.weight",
    "q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias",
    "base_model.model.model.layers.0.self_attn.q_proj.weight",
    "base_model.model.a.lora_A.default.weight",
    "x.y.lora_embedding_B",
]

RENAMES = {
    "none": {},
    "prefix": {
        "prefix": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    },
    "all": {
        "regex": {r"layers\.(\d+)\.": r"blocks.\1."},
        "substr": {".mlp.": ".ff.", ".gate_proj.": ".w1."},
        "prefix": {"model.language_model.": "language_model.model.", "model.visual.": "visual."},
        "suffix": {"q_proj.lora_A.weight": "wq.lora_A.weight"},
    },
}


@pytest.mark.vllm
@pytest.mark.parametrize("rules", RENAMES)
def test_names_are_parsed_as_vllm_parses_them(rules: str) -> None:
    regex = pytest.importorskip("regex")
    utils = pytest.importorskip("vllm.model_executor.models.utils")
    from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

    given: dict[str, dict[str, str]] = RENAMES[rules]
    mapper = utils.WeightsMapper(
        orig_to_new_regex={regex.compile(k): v for k, v in given.get("regex", {}).items()},
        orig_to_new_substr=given.get("substr", {}),
        orig_to_new_prefix=given.get("prefix", {}),
        orig_to_new_suffix=given.get("suffix", {}),
    )
    model = type("Model", (), {"hf_to_vllm_mapper": mapper})()
    from lora_cache.engines.resident.describe import _renames

    renames, refusal = _renames(model)
    assert refusal is None
    parsed_count = 0
    for name in NAMES:
        assert is_skipped(name, ()) == is_base_embedding_weights(name)
        try:
            module, is_a = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            with pytest.raises(CannotPackError):
                parse_name(name, renames)
            continue
        parsed = parse_name(name, renames)
        assert (parsed.module, parsed.matrix == "A") == (module, is_a)
        assert parsed.peft_module == parse_fine_tuned_lora_name(name)[0]
        parsed_count += 1
    assert parsed_count >= 8
