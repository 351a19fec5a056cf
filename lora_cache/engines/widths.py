"""Widths of a base model's linear layers, from its configuration.

vLLM copies whatever it finds into a slot's corner: an adapter of a smaller model is not refused, it
answers nonsense.  So misfits are found before they are loaded.
"""

from __future__ import annotations

from typing import Any

#: Decoders whose layers are all alike and named as Llama's are.  Others are not checked.
_PLAIN_DECODERS = frozenset(
    {
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)


def widths_of(model_config: Any) -> dict[str, tuple[int, int]]:
    """Input and output width by module name; empty when the architecture is not known.

    Args:
        model_config: vLLM's ``ModelConfig``.
    """
    if not _PLAIN_DECODERS.intersection(getattr(model_config, "architectures", None) or ()):
        return {}
    config = model_config.hf_text_config
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    queries = heads * head
    values = (getattr(config, "num_key_value_heads", None) or heads) * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, values),
        "v_proj": (hidden, values),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
