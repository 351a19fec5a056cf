"""From the names in an adapter's file to the names of vLLM's modules, as vLLM does it.

The rules are those of ``parse_fine_tuned_lora_name`` and ``WeightsMapper`` (vLLM 0.32,
``lora/utils.py`` and ``model_executor/models/utils.py``); tests hold the two against each other.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

import msgspec

from lora_cache.errors import CannotPackError

Matrix = Literal["A", "B"]

_PREFIX = "base_model.model."

#: Copies of the base model's own weights that peft saves along; vLLM skips them.
_BASE_WEIGHTS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


class Renames(msgspec.Struct, frozen=True):
    """How a model's checkpoint names become vLLM's: applied in the order of the fields.

    Every rule is (from, to); all rules of a kind are tried one after another, on what the former
    ones have made of the name.

    Attributes:
        regex: pattern and template; every match is replaced.
        substring: its first occurrence is replaced.
        prefix: replaced where the name starts with it.
        suffix: replaced where the name ends with it.
    """

    regex: tuple[tuple[str, str], ...] = ()
    substring: tuple[tuple[str, str], ...] = ()
    prefix: tuple[tuple[str, str], ...] = ()
    suffix: tuple[tuple[str, str], ...] = ()

    def apply(self, name: str) -> str:
        for pattern, template in self.regex:
            name = re.sub(pattern, template, name)
        for old, new in self.substring:
            name = name.replace(old, new, 1)
        for old, new in self.prefix:
            if name.startswith(old):
                name = name.replace(old, new, 1)
        for old, new in self.suffix:
            if name.endswith(old):
                name = new.join(name.rsplit(old, 1))
        return name


class ParsedName(msgspec.Struct, frozen=True):
    """Which matrix of which module a tensor is.

    Attributes:
        module: vLLM's name of the module, e.g. ``model.layers.0.self_attn.q_proj``.
        peft_module: its name in the checkpoint, which rank and alpha patterns refer to.
        matrix: ``A`` is (rank, in), ``B`` is (out, rank).
        is_embedding: it adapts an embedding table: ``A`` is (rank, vocabulary).
    """

    module: str
    peft_module: str
    matrix: Matrix
    is_embedding: bool


def is_skipped(name: str, skip_prefixes: tuple[str, ...]) -> bool:
    """Does vLLM leave this tensor out: base weights, modules that inference does not use?"""
    return name.endswith(_BASE_WEIGHTS) or any(
        f".{prefix}" in name or name.startswith(prefix) for prefix in skip_prefixes
    )


@lru_cache(1 << 16)  # an adapter like the last one, or the next worker's layout: the same names
def parse_name(name: str, renames: Renames) -> ParsedName:
    """Parse the name of one tensor of an adapter's file.

    Raises:
        CannotPackError: it is neither matrix of a LoRA (a bias, a whole module, DoRA's vector).
    """
    module, matrix, is_embedding = _split(name, renames)
    peft_module, _, _ = _split(name, Renames())
    return ParsedName(module, peft_module, matrix, is_embedding)


def _split(name: str, renames: Renames) -> tuple[str, Matrix, bool]:
    if name.startswith(_PREFIX):
        renamed = _PREFIX + renames.apply(name.replace(_PREFIX, ""))
    else:
        renamed = renames.apply(name)
    parts = renamed.removeprefix(_PREFIX).split(".")
    matrices: dict[str, Matrix] = {"lora_A": "A", "lora_B": "B"}
    if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in matrices:
        return ".".join(parts[:-2]), matrices[parts[-2]], False
    embeddings: dict[str, Matrix] = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
    if parts[-1] in embeddings:
        return ".".join(parts[:-1]), embeddings[parts[-1]], True
    raise CannotPackError(f"{name} is no LoRA matrix that the packer knows")
