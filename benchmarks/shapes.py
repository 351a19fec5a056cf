"""A base model of Llama-3.1-8B's shapes without its weights, and adapters for it.

For measurements of time, where what is answered does not matter: vLLM fills the base model itself
(``load_format="dummy"``), the adapters are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_cache.bench import models
from lora_cache.engines.resident.layout import Layout, Piece
from lora_cache.engines.resident.names import Matrix

LLAMA_8B: dict[str, Any] = dict(models.LLAMA_8B)

_ATTENTION = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}
_OUT = {"o_proj": (4096, 4096)}
_MLP = {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}


#: Modules that vLLM serves as one layer, and that one's name.
_JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def write_model(directory: Path) -> Path:
    """Write the configuration; serve it with ``load_format="dummy"``."""
    return models.write_model(directory, LLAMA_8B)


def write_adapters(directory: Path, number: int, rank: int = 16, seed: int = 0) -> list[Path]:
    """Write `number` adapters of all linear layers in bfloat16, 84 MB each at rank 16."""
    return models.write_adapters(directory, LLAMA_8B, number, rank, seed)


def slot_layout(max_rank: int = 64) -> Layout:
    """What a worker of this model has in a slot: bfloat16, one worker."""
    sources: list[str] = []
    pieces: list[Piece] = []

    def add(name: str, module: str, out_width: int, in_width: int) -> None:
        common: dict[str, Any] = {
            "module": name.replace(module, _JOINED.get(module, module)),
            "index": 0,
            "source": len(sources),
            "width_is_exact": True,
            "rank_start": 0,
            "rank_stop": max_rank,
        }
        for a, width in ((True, in_width), (False, out_width)):
            matrix: Matrix = "A" if a else "B"
            spans = ((0, width),)
            piece = Piece(**common, matrix=matrix, rank_first=a, width=width, spans=spans)
            pieces.append(piece)
        sources.append(name)

    for layer in range(LLAMA_8B["num_hidden_layers"]):
        for block, shapes in (("self_attn", _ATTENTION | _OUT), ("mlp", _MLP)):
            for module, (out_width, in_width) in shapes.items():
                add(f"model.layers.{layer}.{block}.{module}", module, out_width, in_width)
    return Layout(
        vllm_version="",
        dtype="bfloat16",
        tp_rank=0,
        tp_size=1,
        fully_sharded=False,
        max_rank=max_rank,
        vocab_size=128256,
        honours_patterns=True,
        sources=tuple(sources),
        pieces=tuple(pieces),
        expected=tuple(_ATTENTION | _OUT | _MLP),
    )
