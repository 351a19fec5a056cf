"""Configurations: tiny ones of every architecture, and published ones with their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 250,  # is padded
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

#: By a name of ours: what differs from `TINY`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama, biases, tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": 32},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "gemma": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **_GELU},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **_GELU},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **_GELU},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
    "granite": {"architectures": ["GraniteForCausalLM"], "model_type": "granite"},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "head_dim": 32,
        "shared_expert_intermediate_size": 128,
        "mlp_only_layers": [1],
        **_MOE,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        **_MOE,
    },
    "qwen3_moe, every other layer": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        **_MOE,
    },
}


def _published(architecture: str, model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return {
        **{name: value for name, value in TINY.items() if name != "head_dim"},
        **dict(zip(names, sizes, strict=True)),
        "architectures": [architecture],
        "model_type": model_type,
        "tie_word_embeddings": False,
        **more,
    }


#: Sizes in the config.json of models on the Hub, and how many parameters these have.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        _published("LlamaForCausalLM", "llama", 4096, 14336, 32, 32, 8, 128256),
    ),
    "Llama-3.1-70B": (
        70_553_706_496,
        _published("LlamaForCausalLM", "llama", 8192, 28672, 80, 64, 8, 128256),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        _published("MistralForCausalLM", "mistral", 4096, 14336, 32, 32, 8, 32000),
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        _published("Qwen2ForCausalLM", "qwen2", 3584, 18944, 28, 28, 4, 152064),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        _published(
            "Qwen2ForCausalLM", "qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True
        ),
    ),
    "Qwen3-8B": (
        8_190_735_360,
        _published("Qwen3ForCausalLM", "qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    ),
    "gemma-2-9b": (
        9_241_705_984,
        _published(
            "Gemma2ForCausalLM",
            "gemma2",
            *(3584, 14336, 42, 16, 8, 256000),
            head_dim=256,
            tie_word_embeddings=True,
            **_GELU,
        ),
    ),
    "Phi-3-mini-4k": (
        3_821_079_552,
        _published("Phi3ForCausalLM", "phi3", 3072, 8192, 32, 32, 32, 32064),
    ),
    "Mixtral-8x7B": (
        46_702_792_704,
        _published(
            "MixtralForCausalLM",
            "mixtral",
            *(4096, 14336, 32, 32, 8, 32000),
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        _published(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            *(2048, 6144, 48, 32, 4, 151936),
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            mlp_only_layers=[],
            decoder_sparse_step=1,
        ),
    ),
}


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """A directory with nothing but a config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny(directory: Path, name: str, **changes: Any) -> Path:
    """A tiny model's."""
    return write_config(directory, TINY | ARCHITECTURES[name] | changes)
