"""Base models to measure with: only their shapes matter, their weights are made up by vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_cache.engines.widths import widths_of
from lora_cache.errors import ConfigError
from lora_cache.plan.model import read_config

#: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (config.json): the demo's model.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}

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

#: Models that need no files.
BUILT_IN: dict[str, dict[str, Any]] = {"smollm2-135m": SMOLLM2, "llama-3.1-8b": LLAMA_8B}

_BLOCKS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}


def write_model(directory: Path, config: dict[str, Any]) -> Path:
    """Write the configuration; vLLM serves it with ``load_format="dummy"``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def find_config(given: str) -> dict[str, Any]:
    """The configuration of a built-in model, of one in a directory, or of one of the Hub's.

    Raises:
        ConfigError: there is none, or its layers are not those of a plain decoder.
    """
    config = BUILT_IN.get(given) or read_config(given)[0]
    if not widths(config):
        raise ConfigError(
            f"{given}: random adapters are made for plain decoders (Llama, Mistral, Qwen2, Qwen3, "
            f"Gemma) only; its architectures are {config.get('architectures')}"
        )
    return config


def write_adapters(
    directory: Path, config: dict[str, Any], number: int, rank: int = 16, seed: int = 0
) -> list[Path]:
    """Write `number` random adapters of all linear layers, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    linear = widths(config)
    torch.manual_seed(seed)
    made = []
    for index in range(number):
        target = directory / f"adapter-{index:03d}"
        target.mkdir(parents=True)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for module, (in_width, out_width) in linear.items():
                name = f"base_model.model.model.layers.{layer}.{_BLOCKS[module]}.{module}"
                a = torch.randn(rank, in_width, dtype=torch.bfloat16) * in_width**-0.5
                b = torch.randn(out_width, rank, dtype=torch.bfloat16) * 0.1
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        save_file(tensors, target / "adapter_model.safetensors")
        lora = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        lora["target_modules"] = sorted(linear)
        (target / "adapter_config.json").write_text(json.dumps(lora))
        made.append(target)
    return made


def widths(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Input and output width of each linear layer; nothing if the architecture is not known.

    Raises:
        ConfigError: the configuration lacks a size.
    """
    fields = SimpleNamespace(**config)
    known = SimpleNamespace(architectures=config.get("architectures"), hf_text_config=fields)
    try:
        return widths_of(known)
    except AttributeError as error:
        raise ConfigError(f"the model's configuration lacks {error.name!r}") from error
