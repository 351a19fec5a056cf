"""Real adapters and a tiny real model, made on the spot: no downloads, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, VOCAB = 2, 128, 256

#: Output and input width of each linear layer of the tiny model.
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN),
    "v_proj": (HIDDEN, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (256, HIDDEN),
    "up_proj": (256, HIDDEN),
    "down_proj": (HIDDEN, 256),
}


def write_tiny_llama(directory: Path) -> Path:
    """A Llama of two layers with random weights, large enough for every token to matter."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN) * np.float32(8),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": random(VOCAB, HIDDEN) * np.float32(4),
    }
    for layer in range(LAYERS):
        for target, (out_width, in_width) in SHAPES.items():
            name = f"model.layers.{layer}.{_block(target)}.{target}.weight"
            tensors[name] = random(out_width, in_width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory


def _block(target: str) -> str:
    return "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def write_adapter(
    directory: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    config: dict[str, Any] | None = None,
    scale: float = 0.5,
    hidden: int = HIDDEN,
) -> Path:
    """A random LoRA for the tiny model, strong enough to change what it says.

    With another `hidden` it is one for a model of other width.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            out_width, in_width = (hidden if w == HIDDEN else w for w in SHAPES[target])
            name = f"base_model.model.model.layers.{layer}.{_block(target)}.{target}"
            a = rng.standard_normal((rank, in_width)) * scale / np.sqrt(in_width)
            b = rng.standard_normal((out_width, rank)) * scale
            tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "base_model_name_or_path": "tiny",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        **(config or {}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
