"""Tiny models of several architectures, adapters for them, and a look into every slot tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, INNER, VOCAB, HEAD = 2, 128, 192, 256, 64
MAX_LORAS, MAX_RANK = 3, 16

#: Output and input width of each kind of module; two query heads share one key and value head.
WIDTHS = {
    "q_proj": (2 * HEAD, HIDDEN),
    "k_proj": (HEAD, HIDDEN),
    "v_proj": (HEAD, HIDDEN),
    "o_proj": (HIDDEN, 2 * HEAD),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
    "gate": (4, HIDDEN),  # a mixture's router
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
EXPERT_COUNT = 4

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": EXPERT_COUNT,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}


def write_model(directory: Path, kind: str) -> Path:
    """A configuration without weights: vLLM makes dummies."""
    config = {
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **ARCHITECTURES[kind],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def module_name(layer: int, target: str) -> str:
    if target == "gate":
        return f"base_model.model.model.layers.{layer}.block_sparse_moe.gate"
    block = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{layer}.{block}.{target}"


def write_adapter(
    directory: Path,
    *,
    seed: int = 0,
    rank: int = 8,
    targets: Sequence[str] = LINEAR,
    ranks: dict[str, int] | None = None,
    dtype: str = "float32",
    extra: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A random adapter.

    Args:
        ranks: by target, what differs from `rank`.
        extra: more tensors, by their full names.
        config: more of `adapter_config.json`.
    """
    import torch
    from safetensors.torch import save_file

    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = dict(extra or {})

    def add(name: str, a: tuple[int, int], b: tuple[int, int], kind: str = ".weight") -> None:
        half = ("lora_A", "lora_B") if kind else ("lora_embedding_A", "lora_embedding_B")
        for end, shape in zip(half, (a, b), strict=True):
            numbers = torch.from_numpy(rng.standard_normal(shape))
            tensors[f"{name}.{end}{kind}"] = numbers.to(getattr(torch, dtype))

    for target in targets:
        r = (ranks or {}).get(target, rank)
        if target == "embed_tokens":
            add("base_model.model.model.embed_tokens", (r, VOCAB), (HIDDEN, r), "")
        elif target == "lm_head":
            add("base_model.model.lm_head", (r, HIDDEN), (VOCAB, r))
        elif target == "experts":
            for layer in range(LAYERS):
                for expert in range(EXPERT_COUNT):
                    for name, (out, into) in EXPERTS.items():
                        where = f"block_sparse_moe.experts.{expert}.{name}"
                        add(f"base_model.model.model.layers.{layer}.{where}", (r, into), (out, r))
        else:
            out, into = WIDTHS[target]
            for layer in range(LAYERS):
                add(module_name(layer, target), (r, into), (out, r))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(set(targets)),
        "bias": "none",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def slot_tensors(manager: Any) -> dict[str, Any]:
    """Every tensor of every LoRA layer that has one entry per slot, whatever it is called.

    Found without a `Layout`, by shape: what the code under test forgets is seen here.
    """
    import torch

    slots, found = manager.lora_slots, {}
    for name, layer in manager.modules.items():
        for attribute, value in vars(layer).items():
            values = value if isinstance(value, (tuple, list)) else (value,)
            for index, tensor in enumerate(values):
                if torch.is_tensor(tensor) and tensor.dim() and len(tensor) in (slots, slots + 1):
                    found[f"{name}.{attribute}.{index}"] = tensor
    return found


def slot_of(manager: Any, slot: int) -> dict[str, Any]:
    """A copy of everything that one slot holds."""
    return {name: tensor[slot].clone() for name, tensor in slot_tensors(manager).items()}


def soil(manager: Any, slot: int, seed: int = 0) -> None:
    """Fill a slot to its last number, as no adapter would: what a write leaves over shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for tensor in slot_tensors(manager).values():
            noise = torch.randint(1, 9, tensor[slot].shape, generator=generator)
            tensor[slot].copy_(noise.to(tensor.dtype))


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not bit for bit alike (zeros of either sign are)."""
    import torch

    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]
