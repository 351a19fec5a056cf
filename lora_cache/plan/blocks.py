"""What decoders are made of: attention, MLPs, experts, the table and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_cache.plan.fields import Fields
from lora_cache.plan.layers import Layer, Split, Width

_FLAG_BYTES = 4  # vLLM's `adapter_enabled`: one int32 a slot and layer of experts, and one more


@dataclass(frozen=True, slots=True)
class Shape:
    """What an architecture makes of a configuration.

    Attributes:
        layers: everything with weights but the norms.
        vectors: numbers in norms, which every GPU has whole.
        decoder_layers: how many there are.
        kv_heads, head: key and value heads, and the width of one.
        hidden: width of the residual stream.
        inner: width that each token takes inside the largest MLP, all chosen experts together.
        sliding: some layers only look back over a window.
    """

    layers: tuple[Layer, ...]
    vectors: int
    decoder_layers: int
    kv_heads: int
    head: int
    hidden: int
    inner: int
    sliding: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """What differs between the attentions of decoders."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    qkv_bias: bool = False
    out_bias: bool = False
    fused: bool = False  # the checkpoint has one matrix for queries, keys and values

    def layers(self, number: int) -> list[Layer]:
        """Those of so many blocks."""
        queries = Width(self.heads * self.head, self.head)
        values = Width(self.kv_heads * self.head, self.head, is_shared=True)
        slices: tuple[tuple[Width, ...], ...] = ((queries,), (values,), (values,))
        members: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
        if self.fused:
            slices, members = ((queries, values, values),), ("qkv_proj",)
        qkv = Layer(
            "qkv_proj",
            Split.COLUMNS,
            number,
            self.hidden,
            slices,
            members,
            has_bias=self.qkv_bias,
        )
        out = rows("o_proj", number, queries.size, self.hidden, has_bias=self.out_bias)
        return [qkv, out]


def rows(name: str, number: int, inputs: int, outputs: int, **more: Any) -> Layer:
    """A layer that is split by its inputs."""
    return Layer(name, Split.ROWS, number, inputs, ((Width(outputs),),), (name,), **more)


def mlp(
    number: int,
    hidden: int,
    inner: int,
    *,
    bias: bool = False,
    fused: bool = False,
    has_lora: bool = True,
) -> list[Layer]:
    """Gate and up in one layer, and down.

    Args:
        fused: the checkpoint has one matrix for gate and up.
        has_lora: vLLM has LoRA for that layer; for down it always has.
    """
    half = Width(inner)
    slices: tuple[tuple[Width, ...], ...] = ((half,), (half,))
    members: tuple[str, ...] = ("gate_proj", "up_proj")
    if fused:
        slices, members = ((half, half),), ("gate_up_proj",)
    up = Layer(
        "gate_up_proj",
        Split.COLUMNS,
        number,
        hidden,
        slices,
        members,
        has_bias=bias,
        has_lora=has_lora,
    )
    return [up, rows("down_proj", number, inner, hidden, has_bias=bias)]


def experts(
    number: int, hidden: int, inner: int, count: int, names: tuple[str, str, str]
) -> list[Layer]:
    """A router, and experts that each are an MLP.  `names`: gate, up and down."""
    router = Layer(
        "gate", Split.NONE, number, hidden, ((Width(count),),), ("gate",), quantizes=False
    )
    half = Width(inner)
    up = Layer(
        "experts.w13",
        Split.COLUMNS,
        number,
        hidden,
        ((half,), (half,)),
        names[:2],
        copies=count,
        flag_bytes=_FLAG_BYTES,
    )
    down = Layer(
        "experts.w2",
        Split.ROWS,
        number,
        inner,
        ((Width(hidden),),),
        names[2:],
        copies=count,
    )
    return [router, up, down]


def vocabulary(fields: Fields, hidden: int, *, has_lora: bool, tied: bool) -> list[Layer]:
    """The embedding table, and the head; a tied head has the table's weights."""
    vocab = fields.number("vocab_size")
    table = Layer(
        "embed_tokens",
        Split.EMBEDDING,
        1,
        vocab,
        ((Width(hidden),),),
        ("embed_tokens",),
        has_lora=has_lora,
        quantizes=False,
    )
    head = Layer(
        "lm_head",
        Split.LOGITS,
        1,
        hidden,
        ((Width(vocab),),),
        ("lm_head",),
        has_lora=has_lora,
        has_weight=not tied,
        quantizes=False,
    )
    return [table, head]
