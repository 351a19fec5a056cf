"""A base model of Llama-3.1-8B's shapes without its weights, and adapters for it.

For measurements of time, where what is answered does not matter: vLLM fills the base model itself
(``load_format="dummy"``), the adapters are random.
"""

from __future__ import annotations

import json
from pathlib import Path

#: https://huggingface.co/meta-llama/Llama-3.1-8B (config.json); contexts beyond 8k are left out.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}

_ATTENTION = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}
_OUT = {"o_proj": (4096, 4096)}
_MLP = {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}


def write_model(directory: Path) -> Path:
    """Write the configuration; serve it with ``load_format="dummy"``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return directory


def write_adapters(directory: Path, number: int, rank: int = 16, seed: int = 0) -> list[Path]:
    """Write `number` adapters of all linear layers in bfloat16, 84 MB each at rank 16."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    made = []
    for index in range(number):
        target = directory / f"adapter-{index:03d}"
        target.mkdir(parents=True)
        tensors = {}
        for layer in range(LLAMA_8B["num_hidden_layers"]):  # type: ignore[call-overload]
            for block, shapes in (("self_attn", _ATTENTION | _OUT), ("mlp", _MLP)):
                for module, (out_width, in_width) in shapes.items():
                    name = f"base_model.model.model.layers.{layer}.{block}.{module}"
                    a = torch.randn(rank, in_width, dtype=torch.bfloat16) * in_width**-0.5
                    b = torch.randn(out_width, rank, dtype=torch.bfloat16) * 0.1
                    tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        save_file(tensors, target / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(_ATTENTION | _OUT | _MLP),
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
        made.append(target)
    return made
