"""A layout as a worker would export it, for tests without vLLM."""

from __future__ import annotations

from lora_cache.engines.resident.layout import Layout, Piece
from tests.resident.parts import LAYERS, LINEAR, MAX_RANK, VOCAB, WIDTHS, module_name

PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}


def plain_layout(dtype: str = "bfloat16", **changes: object) -> Layout:
    """The tiny Llama's linear layers on one worker."""
    sources: list[str] = []
    pieces: list[Piece] = []
    for layer in range(LAYERS):
        for target in LINEAR:
            out, into = WIDTHS[target]
            name = module_name(layer, target).removeprefix("base_model.model.")
            for matrix, width in (("A", into), ("B", out)):
                pieces.append(
                    Piece(
                        module=name.replace(target, PACKED.get(target, target)),
                        index=0,
                        matrix="A" if matrix == "A" else "B",
                        source=len(sources),
                        rank_first=matrix == "A",
                        width=width,
                        width_is_exact=True,
                        spans=((0, width),),
                        rank_start=0,
                        rank_stop=MAX_RANK,
                    )
                )
            sources.append(name)
    arguments: dict[str, object] = {
        "vllm_version": "0",
        "dtype": dtype,
        "tp_rank": 0,
        "tp_size": 1,
        "fully_sharded": False,
        "max_rank": MAX_RANK,
        "vocab_size": VOCAB,
        "honours_patterns": True,
        "sources": tuple(sources),
        "pieces": tuple(pieces),
        "expected": LINEAR,
    }
    return Layout(**{**arguments, **changes})  # type: ignore[arg-type]
