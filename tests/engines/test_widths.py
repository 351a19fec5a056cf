"""Widths of the base model's layers, from its configuration alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lora_cache.engines.widths import widths_of


def config(architecture: str, **values: Any) -> Any:
    return SimpleNamespace(architectures=[architecture], hf_text_config=SimpleNamespace(**values))


def test_grouped_queries_and_a_head_width_of_its_own() -> None:
    """Qwen3-0.6B: 16 query and 8 key-value heads of 128, although the model is 1024 wide."""
    widths = widths_of(
        config(
            "Qwen3ForCausalLM",
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        )
    )
    assert widths["q_proj"] == (1024, 2048)
    assert widths["v_proj"] == (1024, 1024)
    assert widths["o_proj"] == (2048, 1024)
    assert widths["down_proj"] == (3072, 1024)


def test_what_the_configuration_leaves_out() -> None:
    """Llama-7B names neither head width nor key-value heads."""
    widths = widths_of(
        config(
            "LlamaForCausalLM", hidden_size=4096, intermediate_size=11008, num_attention_heads=32
        )
    )
    assert widths["k_proj"] == (4096, 4096)


def test_unknown_architectures_are_not_judged() -> None:
    assert widths_of(config("MixtralForCausalLM")) == {}
