"""The architectures that are known: what layers each has, by its configuration.

Sources: vLLM 0.26, 0.32 and 0.33, ``vllm/model_executor/models/``; defaults of fields that a
configuration leaves out: the configuration classes of Transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_cache.plan.blocks import Attention, Shape, experts, mlp, vocabulary
from lora_cache.plan.fields import Fields
from lora_cache.plan.layers import Layer, Split, Width

# ---------------------------------------------------------------------- decoders


def _decoder(
    fields: Fields,
    *,
    embeds: bool,
    tied: bool = False,
    kv_heads: int | None = None,
    head: int | None = None,
    ignores_head: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    fused: bool = False,
    norms: int = 2,
    qk_norm: bool = False,
    sliding: bool = False,
) -> Shape:
    """A decoder whose layers are all alike.

    Args:
        embeds: vLLM has LoRA for its embedding table and head.
        tied, kv_heads, head: what the configuration means where it says nothing; `kv_heads`: as
            many as there are heads, `head`: hidden size by heads.
        ignores_head: the configuration's ``head_dim`` is not looked at.
    """
    hidden, inner = fields.number("hidden_size"), fields.number("intermediate_size")
    number = fields.number("num_hidden_layers")
    attention = _attention(fields, hidden, kv_heads, head, ignores_head)
    attention = replace(attention, qkv_bias=qkv_bias, out_bias=out_bias, fused=fused)
    layers = [
        *attention.layers(number),
        *mlp(number, hidden, inner, bias=mlp_bias, fused=fused),
        *vocabulary(fields, hidden, has_lora=embeds, tied=fields.flag("tie_word_embeddings", tied)),
    ]
    vectors = hidden * (norms * number + 1) + (2 * attention.head * number if qk_norm else 0)
    return Shape(
        tuple(layers),
        vectors,
        number,
        attention.kv_heads,
        attention.head,
        hidden,
        inner,
        sliding,
    )


def _attention(
    fields: Fields,
    hidden: int,
    kv_heads: int | None,
    head: int | None,
    ignores_head: bool = False,
) -> Attention:
    heads = fields.number("num_attention_heads")
    width = head or max(1, hidden // heads)
    if not ignores_head:
        width = fields.number("head_dim", width)
    kv = fields.number("num_key_value_heads", kv_heads or heads)
    return Attention(hidden, heads, kv, width)


def _llama(fields: Fields, *, embeds: bool = True, kv_heads: int | None = None) -> Shape:
    bias = fields.flag("attention_bias") or fields.flag("bias")
    return _decoder(
        fields,
        embeds=embeds,
        kv_heads=kv_heads,
        qkv_bias=fields.flag("qkv_bias", bias),
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        sliding=fields.has("sliding_window"),
    )


def _granite(fields: Fields) -> Shape:
    bias = fields.flag("attention_bias") or fields.flag("bias")
    return _decoder(
        fields, embeds=True, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias")
    )


def _mistral(fields: Fields) -> Shape:
    return _llama(fields, embeds=False, kv_heads=8)


def _phi3(fields: Fields) -> Shape:
    return _decoder(fields, embeds=True, fused=True, sliding=fields.has("sliding_window"))


def _qwen2(fields: Fields) -> Shape:
    norm = fields.flag("qk_norm")
    return _decoder(
        fields, embeds=False, kv_heads=32, ignores_head=True, qkv_bias=True, qk_norm=norm
    )


def _qwen3(fields: Fields) -> Shape:
    bias = fields.flag("attention_bias")
    return _decoder(fields, embeds=True, kv_heads=32, head=128, qkv_bias=bias, qk_norm=True)


def _gemma(fields: Fields) -> Shape:
    return _decoder(fields, embeds=False, tied=True, kv_heads=16, head=256)


def _gemma2(fields: Fields) -> Shape:
    bias = fields.flag("attention_bias")
    return _decoder(
        fields,
        embeds=False,
        tied=True,
        kv_heads=4,
        head=256,
        qkv_bias=bias,
        out_bias=bias,
        norms=4,
        sliding=True,
    )


def _gemma3(fields: Fields) -> Shape:
    bias = fields.flag("attention_bias")
    return _decoder(
        fields,
        embeds=False,
        tied=True,
        kv_heads=4,
        head=256,
        qkv_bias=bias,
        out_bias=bias,
        norms=4,
        qk_norm=True,
        sliding=True,
    )


# ---------------------------------------------------------------------- mixtures of experts


def _mixtral(fields: Fields) -> Shape:
    hidden, inner = fields.number("hidden_size"), fields.number("intermediate_size")
    number, count = fields.number("num_hidden_layers"), fields.number("num_local_experts", 8)
    attention = _attention(fields, hidden, 8, None)
    layers = [
        *attention.layers(number),
        *experts(number, hidden, inner, count, ("w1", "w3", "w2")),
        *vocabulary(fields, hidden, has_lora=True, tied=fields.flag("tie_word_embeddings")),
    ]
    chosen = fields.number("num_experts_per_tok", 2) * inner
    kv, head = attention.kv_heads, attention.head
    vectors = hidden * (2 * number + 1)
    sliding = fields.has("sliding_window")
    return Shape(tuple(layers), vectors, number, kv, head, hidden, chosen, sliding)


def _qwen_moe(
    fields: Fields, attention: Attention, *, embeds: bool, shared: int, qk_norm: bool
) -> Shape:
    """Layers of experts, some of which may be plain MLPs instead.

    Args:
        shared: width of the expert that every token passes; 0 for none.
    """
    hidden, number = attention.hidden, fields.number("num_hidden_layers")
    plain = fields.numbers("mlp_only_layers")
    step = fields.number("decoder_sparse_step", 1)
    sparse = sum(layer not in plain and (layer + 1) % step == 0 for layer in range(number))
    inner = fields.number("moe_intermediate_size")
    count = fields.number("num_experts")
    # vLLM knows how to take gate_up_proj apart only if it expects one.
    has_lora = bool(plain) or shared > 0
    layers = [
        *attention.layers(number),
        *experts(sparse, hidden, inner, count, ("gate_proj", "up_proj", "down_proj")),
        *vocabulary(fields, hidden, has_lora=embeds, tied=fields.flag("tie_word_embeddings")),
    ]
    chosen = fields.number("num_experts_per_tok") * inner + shared
    if sparse < number:
        width = fields.number("intermediate_size")
        layers += mlp(number - sparse, hidden, width, has_lora=has_lora)
        chosen = max(chosen, width)
    if shared:
        gate = Layer(
            "shared_expert_gate",
            Split.NONE,
            sparse,
            hidden,
            ((Width(1),),),
            ("shared_expert_gate",),
            quantizes=False,
        )
        layers += [gate, *mlp(sparse, hidden, shared, has_lora=has_lora)]
    vectors = hidden * (2 * number + 1) + (2 * attention.head * number if qk_norm else 0)
    kv, head = attention.kv_heads, attention.head
    return Shape(tuple(layers), vectors, number, kv, head, hidden, chosen)


def _qwen2_moe(fields: Fields) -> Shape:
    hidden = fields.number("hidden_size")
    bias = fields.flag("qkv_bias", True)
    attention = _attention(fields, hidden, 16, None, ignores_head=True)
    attention = replace(attention, qkv_bias=bias)
    shared = fields.number("shared_expert_intermediate_size", 0)
    return _qwen_moe(fields, attention, embeds=False, shared=shared, qk_norm=False)


def _qwen3_moe(fields: Fields) -> Shape:
    hidden = fields.number("hidden_size")
    bias = fields.flag("attention_bias")
    attention = replace(_attention(fields, hidden, 4, None), qkv_bias=bias)
    shared = fields.number("shared_expert_intermediate_size", 0)
    return _qwen_moe(fields, attention, embeds=True, shared=shared, qk_norm=True)


#: By the name in a configuration's ``architectures``.
KNOWN: dict[str, Callable[[Fields], Shape]] = {
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GemmaForCausalLM": _gemma,
    "GraniteForCausalLM": _granite,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Phi3ForCausalLM": _phi3,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
