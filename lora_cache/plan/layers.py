"""The layers of a model as vLLM builds them: what each takes as weights, and in a LoRA slot.

A slot has, for every layer, room for ``A`` (rank × inputs) and ``B`` (outputs × rank) of the
largest rank, whether an adapter uses it or not.  The shapes are those of vLLM's
``create_lora_weights`` (``vllm/lora/layers/``, the same in 0.26, 0.32 and 0.33); a test compares
every architecture with what vLLM allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lora_cache.errors import ConfigError

#: vLLM pads the vocabulary to a multiple of this (``VocabParallelEmbedding``).
_VOCAB_PADDING = 64


class Split(Enum):
    """How tensor parallelism divides a layer."""

    COLUMNS = "outputs"  #: each GPU computes some of the outputs
    ROWS = "inputs"  #: each GPU takes some of the inputs
    NONE = "not split"  #: each GPU has all of it
    EMBEDDING = "vocabulary"  #: the table is split, its LoRA is not
    LOGITS = "vocabulary, head"  #: likewise


@dataclass(frozen=True, slots=True)
class Width:
    """Outputs of one part of a layer.

    Attributes:
        size: of the whole model.
        unit: what is never cut: an attention head.
        is_shared: several GPUs may hold the same unit, where there are more GPUs than units.
    """

    size: int
    unit: int = 1
    is_shared: bool = False

    def share(self, tp: int) -> int:
        """How many one of `tp` GPUs computes."""
        return max(self.size // tp, self.unit) if self.is_shared else self.size // tp

    def divides(self, tp: int) -> bool:
        """Does vLLM divide it among `tp` GPUs?"""
        units = self.size // self.unit
        return units % tp == 0 or (self.is_shared and tp % units == 0)


@dataclass(frozen=True, slots=True)
class Tensors:
    """What one layer has in one slot on one GPU: numbers, not bytes.

    Attributes:
        a, b: shapes of the stacked tensors, one pair a slice.
    """

    a: tuple[tuple[int, int], ...]
    b: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return sum(rows * columns for rows, columns in (*self.a, *self.b))


@dataclass(frozen=True, slots=True)
class Layer:
    """One kind of layer.

    Attributes:
        name: the last part of its name in vLLM, e.g. ``qkv_proj``.
        number: how many of them the model has.
        inputs: its input width, of the whole model.
        slices: its outputs.  A slice is what has an ``A`` and a ``B`` of its own; it may be made
            of several widths that a checkpoint does not tell apart.
        members: what adapters call the slices.
        copies: experts, or 1.
        has_lora: vLLM makes room for it in slots.
        has_weight: it has a weight of its own (a tied head has not).
        has_bias: and a bias.
        quantizes: quantization, where there is any, applies to it.
        flag_bytes: further bytes in each slot, and as many once more beside all slots.
    """

    name: str
    split: Split
    number: int
    inputs: int
    slices: tuple[tuple[Width, ...], ...]
    members: tuple[str, ...]
    copies: int = 1
    has_lora: bool = True
    has_weight: bool = True
    has_bias: bool = False
    quantizes: bool = True
    flag_bytes: int = 0

    def tensors(self, rank: int, tp: int, *, sharded: bool) -> Tensors:
        """What each of its slots holds on one GPU, for one copy.

        Args:
            rank: vLLM's ``max_lora_rank``.
            sharded: vLLM's ``fully_sharded_loras``.
        """
        outputs = [sum(width.share(tp) for width in parts) for parts in self.slices]
        if self.split is Split.EMBEDDING:  # the table's "input" is the vocabulary
            return Tensors(((self.inputs, rank),), ((self._full(0), rank),))
        if self.split in (Split.NONE, Split.LOGITS):
            return Tensors(((rank, self.inputs),), ((self._full(0), rank),))
        if self.split is Split.COLUMNS:
            held = rank // tp if sharded else rank
            a = tuple((held, self.inputs) for _ in self.slices)
            return Tensors(a, tuple((out, rank) for out in outputs))
        whole = self._full(0)
        b = (whole // tp if sharded else whole, rank)
        return Tensors(((rank, self.inputs // tp),), (b,))

    def slot_bytes(self, rank: int, tp: int, item: int, *, sharded: bool) -> int:
        """Bytes of all layers of this kind in one slot on one GPU.

        Args:
            item: bytes of a number.
        """
        if not self.has_lora:
            return 0
        numbers = self.copies * self.tensors(rank, tp, sharded=sharded).count
        return self.number * (numbers * item + self.flag_bytes)

    def weights(self, tp: int) -> int:
        """Numbers in the weights of all layers of this kind on one GPU, biases left out."""
        if not self.has_weight:
            return 0
        if self.split in (Split.EMBEDDING, Split.LOGITS):
            hidden = self._full(0) if self.split is Split.EMBEDDING else self.inputs
            return self.number * (self.padded_vocab // tp) * hidden
        outputs = sum(width.share(tp) for parts in self.slices for width in parts)
        if self.split is Split.COLUMNS:
            return self.number * self.copies * self.inputs * outputs
        whole = sum(map(self._full, range(len(self.slices))))
        inputs = self.inputs // tp if self.split is Split.ROWS else self.inputs
        return self.number * self.copies * inputs * whole

    def biases(self, tp: int) -> int:
        """Numbers in its biases on one GPU."""
        if not self.has_bias:
            return 0
        whole = self.split is not Split.COLUMNS
        widths = [width for parts in self.slices for width in parts]
        return self.number * sum(w.size if whole else w.share(tp) for w in widths)

    def adapter_numbers(self, rank: int) -> int:
        """Numbers in an adapter of `rank` that targets all layers of this kind."""
        per_rank = sum(self.inputs + self._full(index) for index in range(len(self.slices)))
        return self.number * self.copies * per_rank * rank

    @property
    def padded_vocab(self) -> int:
        """Entries of a table or head, as vLLM pads them."""
        vocab = self.inputs if self.split is Split.EMBEDDING else self._full(0)
        return -(-vocab // _VOCAB_PADDING) * _VOCAB_PADDING

    def _full(self, index: int) -> int:
        return sum(width.size for width in self.slices[index])

    def misfits(self, tp: int, rank: int, *, sharded: bool) -> Iterator[str]:
        """Why it cannot be divided among `tp` GPUs."""
        if self.split is Split.ROWS and self.inputs % tp:
            yield f"{self.name} has {self.inputs} inputs"
        if self.split is Split.COLUMNS:
            for width in (width for parts in self.slices for width in parts):
                if not width.divides(tp):
                    heads = "" if width.unit == 1 else f", heads of {width.unit}"
                    yield f"{self.name} has {width.size} outputs{heads}"
        if self.split in (Split.EMBEDDING, Split.LOGITS) and self.padded_vocab % tp:
            yield f"the vocabulary has {self.padded_vocab} entries"
        if sharded and self.has_lora:
            if self.split is Split.COLUMNS and rank % tp:
                yield f"fully sharded slots have rank {rank}"
            if self.split is Split.ROWS and self._full(0) % tp:
                yield f"{self.name} has {self._full(0)} outputs, and slots are fully sharded"


def check_split(
    layers: tuple[Layer, ...], tp: int, rank: int = 1, *, sharded: bool = False
) -> None:
    """Raise `ConfigError` if vLLM could not divide these layers among `tp` GPUs."""
    for layer in layers:
        for reason in layer.misfits(tp, rank, sharded=sharded):
            raise ConfigError(f"{reason}: that cannot be divided among {tp} GPUs")
