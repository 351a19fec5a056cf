"""What one LoRA layer does with an adapter's matrices, found out by giving it numbered ones.

No knowledge of vLLM's layer classes is copied: a shadow of the layer, whose slot tensors are
ours, is given matrices whose every element says where it stands, and its own `set_lora` puts them
where they belong.  What arrives tells which rows and columns this worker takes, sliced, transposed,
split or joined.  Whatever does not arrive as a rectangle is left to vLLM's loader.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from lora_cache.engines.resident.layout import Piece

# A number is source, rank and position along the other axis, in one int64; 0 is an empty place.
_POSITION_BITS, _RANK_BITS = 32, 20
_RANK_UNIT, _SOURCE_UNIT = 1 << _POSITION_BITS, 1 << (_POSITION_BITS + _RANK_BITS)


class UnknownLayerError(Exception):
    """A layer's slots hold more, or are filled in other ways, than the packer knows."""


def signature(layer: Any, source_count: int) -> tuple[Any, ...]:
    """Layers of equal signature treat adapters alike: numbers and shapes say all, names nothing."""

    def numbers(values: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in sorted(values.items())
            if isinstance(value, (bool, int, float))
            or (isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value))
        )

    shapes = tuple(
        tuple(tensor.shape) if torch.is_tensor(tensor) else tuple(t.shape for t in tensor)
        for tensor in (vars(layer).get("lora_a_stacked", ()), vars(layer).get("lora_b_stacked", ()))
    )
    base = layer.base_layer
    return (
        type(layer),
        type(base),
        source_count,
        shapes,
        numbers(vars(layer)),
        numbers(vars(base)),
    )


def probe(
    layer: Any, source_count: int, slots: int, max_rank: int, dtype: torch.dtype
) -> list[Piece]:
    """The pieces of a layer; their `module` is empty, their sources count from 0.

    Args:
        layer: a vLLM ``BaseLayerWithLoRA``; it is not changed.
        source_count: how many adapter modules are packed in it; 1 if it is not packed.
        slots: how many slots its tensors have.
        max_rank: the largest rank that an adapter may have.
        dtype: of all slot tensors.

    Raises:
        UnknownLayerError: the packer cannot fill this layer.
    """
    _check_state(layer, slots, dtype)
    return _Probe(layer, source_count, max_rank).pieces()


def _check_state(layer: Any, slots: int, dtype: torch.dtype) -> None:
    stacked: list[torch.Tensor] = []
    for name in ("lora_a_stacked", "lora_b_stacked"):
        value = vars(layer).get(name)
        tensors = [value] if torch.is_tensor(value) else value
        if not tensors or isinstance(value, list) or any(t.shape[0] != slots for t in tensors):
            raise UnknownLayerError(f"{name} is not one tensor of {slots} slots per slice")
        stacked += tensors
    if not all(t.dtype == dtype and t.is_contiguous() for t in stacked):
        raise UnknownLayerError(f"its slot tensors are not of {dtype}, or not contiguous")
    known = {t.untyped_storage().data_ptr() for t in stacked}
    for name, value in vars(layer).items():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if (
                torch.is_tensor(tensor)
                and tensor.dim()
                and tensor.shape[0] in (slots, slots + 1)  # MoE has one for "no adapter"
                and tensor.untyped_storage().data_ptr() not in known
            ):
                raise UnknownLayerError(f"{name} may be a slot's too")


class _Probe:
    def __init__(self, layer: Any, source_count: int, max_rank: int) -> None:
        self.layer = layer
        self.source_count = source_count
        self.max_rank = max_rank
        self.a, self.a_is_single = _as_list(layer.lora_a_stacked)
        self.b, self.b_is_single = _as_list(layer.lora_b_stacked)
        # What an adapter has is as wide as the whole model's layer, of which this worker may hold
        # a part.  Embedding tables and the logits are whole everywhere (and their base layers'
        # sizes are not the adapter's); a table's A lies the other way round, (vocabulary, rank).
        base = None if self.b_is_single else layer.base_layer
        a_axis = -2 if self.a[0].dim() == 3 else -1
        self.a_width = int(getattr(base, "input_size", self.a[0].shape[a_axis]))
        widths = [int(t.shape[-2]) for t in self.b]
        if len(widths) > 1:
            widths = [int(size) for size in getattr(base, "output_sizes", widths)]
        else:
            widths = [int(getattr(base, "output_size", widths[0]))]
        if source_count == 1:
            widths = [sum(widths)]
        if len(widths) != source_count:
            raise UnknownLayerError(f"{source_count} adapter modules go into {len(widths)} slices")
        self.b_widths = widths

    def pieces(self) -> list[Piece]:
        everything = self._all
        filled = self._set_lora(self.max_rank, everything)
        pieces = [self._read(number, tensor) for number, tensor in enumerate(filled)]
        for rank in sorted({1, (self.max_rank + 1) // 2, self.max_rank}):
            self._verify(pieces, rank, everything)
        if self.source_count > 1:
            for source in everything:
                self._verify(pieces, 1, {source})
        return pieces

    def _set_lora(self, rank: int, sources: set[int], stretch: int = 1) -> list[torch.Tensor]:
        """Fill a shadow's slot with numbered matrices; one (rows, columns) tensor per slot tensor.

        `stretch` multiplies the width of the B matrices.
        """
        shadow = object.__new__(type(self.layer))
        shadow.__dict__.update(vars(self.layer))
        a = [torch.zeros((1, *t.shape[1:]), dtype=torch.int64) for t in self.a]
        b = [torch.zeros((1, *t.shape[1:]), dtype=torch.int64) for t in self.b]
        shadow.__dict__["lora_a_stacked"] = a[0] if self.a_is_single else tuple(a)
        shadow.__dict__["lora_b_stacked"] = b[0] if self.b_is_single else tuple(b)
        lora_a: list[torch.Tensor | None] = []
        lora_b: list[torch.Tensor | None] = []
        for source in range(self.source_count):
            present = source in sources
            width = self.b_widths[source] * stretch
            lora_a.append(_numbered(source, rank, self.a_width) if present else None)
            lora_b.append(_numbered(source, rank, width).T.contiguous() if present else None)
        try:
            if self.source_count > 1:
                shadow.set_lora(0, lora_a, lora_b)
            else:
                shadow.set_lora(0, lora_a[0], lora_b[0])
        except Exception as error:
            raise UnknownLayerError(f"set_lora: {error}") from error
        return [tensor.reshape(tensor.shape[-2:]) for tensor in (*a, *b)]

    def _read(self, number: int, filled: torch.Tensor) -> Piece:
        """The piece that explains this slot tensor; `_verify` tells whether it really does."""
        is_a = number < len(self.a)
        index = number if is_a else number - len(self.a)
        is_single = self.a_is_single if is_a else self.b_is_single
        code = filled - 1
        columns_move = filled.shape[1] > 1 and bool(filled[0, 1])
        if columns_move:
            columns_move = int(code[0, 0]) % _RANK_UNIT != int(code[0, 1]) % _RANK_UNIT
        line = code[0] if columns_move else code[:, 0]
        line = line[line >= 0] % _RANK_UNIT
        across = code[:, 0] if columns_move else code[0]
        across = (across[across >= 0] // _RANK_UNIT) % (1 << _RANK_BITS)
        if not len(line) or not len(across):
            raise UnknownLayerError("an adapter leaves one of its slot tensors empty")
        if len(line) != filled.shape[1 if columns_move else 0]:
            raise UnknownLayerError("an adapter fills but a part of one of its slot tensors")
        source = int(code[0, 0]) // _SOURCE_UNIT
        return Piece(
            module="",
            index=None if is_single else index,
            matrix="A" if is_a else "B",
            source=source,
            rank_first=columns_move,
            width=self.a_width if is_a else self.b_widths[source],
            width_is_exact=is_a or not self._is_cut_alike(number, filled),
            spans=_spans(line),
            rank_start=int(across[0]),
            rank_stop=int(across[0]) + len(across),
        )

    def _is_cut_alike(self, number: int, filled: torch.Tensor) -> bool:
        """Does the layer take the same part of a longer B?

        So it is where key and value heads are replicated: the base layer counts the copies, the
        adapter has each head once.
        """
        try:
            return bool(torch.equal(self._set_lora(self.max_rank, self._all, 2)[number], filled))
        except UnknownLayerError:
            return False

    @property
    def _all(self) -> set[int]:
        return set(range(self.source_count))

    def _verify(self, pieces: list[Piece], rank: int, sources: set[int]) -> None:
        filled = self._set_lora(rank, sources)
        for piece, tensor in zip(pieces, filled, strict=True):
            expected = torch.zeros_like(tensor)
            ranks = piece.ranks(rank)
            if piece.source in sources and ranks:
                whole = _numbered(piece.source, rank, piece.width)
                part = torch.cat([whole[:, start:stop] for start, stop in piece.spans], dim=1)
                part = part[piece.rank_start : piece.rank_start + ranks]
                rows, columns = piece.shape(rank)
                expected[:rows, :columns] = part if piece.rank_first else part.T
            if not torch.equal(expected, tensor):
                raise UnknownLayerError(f"at rank {rank} it takes no rectangle of the matrices")


def _as_list(stacked: Any) -> tuple[list[torch.Tensor], bool]:
    return ([stacked], True) if torch.is_tensor(stacked) else (list(stacked), False)


def _numbered(source: int, rank: int, width: int) -> torch.Tensor:
    """A (rank, width) int64 matrix whose elements say where they stand."""
    ranks = torch.arange(rank, dtype=torch.int64)[:, None] * _RANK_UNIT
    return ranks + torch.arange(width, dtype=torch.int64) + (source * _SOURCE_UNIT + 1)


def _spans(positions: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive positions, as (start, stop)."""
    breaks = (torch.nonzero(positions.diff() != 1).flatten() + 1).tolist()
    edges = [0, *breaks, len(positions)]
    return tuple((int(positions[i]), int(positions[j - 1]) + 1) for i, j in pairwise(edges))
