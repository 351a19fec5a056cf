"""One kernel that writes a whole slot from an image: the adapter's numbers, and zeros around them.

A slot of a Llama-8B has 450 tensors.  One copy each costs more time on the CPU, and more of the
interpreter lock that the step loop needs, than the copying itself takes on the GPU; and where an
adapter's rank is below the slot's, half of those copies are strided (4.5 ms on an H100 for rank 8
in slots of rank 16, against 0.09 ms).  So the places of all pieces lie in tables on the device,
made once for every kind of image, and the kernel looks them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

#: Numbers that one program of the kernel writes.
_TILE = 4096
_WARPS = 4

_WIDE_BYTES = 16  #: of one access to memory, if addresses are multiples of it

#: Numbers are moved, not computed with: integers of their size do.
_MOVED_AS = {2: torch.int16, 4: torch.int32}


class Place(NamedTuple):
    """A piece of an image, and the tensor into whose upper left corner it goes."""

    tensor: int  #: its index among those of the `Scatter`
    rows: int
    columns: int
    offset: int  #: where in the image it starts, in numbers


class Scatter:
    """Writes images into slots, whole.

    Thread-safe; everything is queued on the current stream.

    Args:
        tensors: every stacked tensor of the slots, ``(slots, ..., height, width)``, on one device
            and of one dtype.

    Raises:
        ValueError: one of them is not contiguous.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._item_bytes = tensors[0].element_size()
        self._device = tensors[0].device
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("a slot tensor is not contiguous")
        # Of each tensor its address, numbers a slot and numbers a row; of a place its rows,
        # columns and offset.
        self._tensors = [(t.data_ptr(), t[0].numel(), t.shape[-1], 0, 0, 0) for t in tensors]
        counts = torch.tensor([-(-size // _TILE) for _, size, *_ in self._tensors])
        numbers = torch.repeat_interleave(torch.arange(len(tensors)), counts)
        firsts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        starts = (torch.arange(len(numbers)) - firsts) * _TILE
        self._tiles = torch.stack([numbers, starts], 1).to(self._device, torch.int32)
        self._aligned = all(
            address % _WIDE_BYTES == 0 and size * self._item_bytes % _WIDE_BYTES == 0
            for address, size, *_ in self._tensors
        )

    def table(self, places: Iterable[Place]) -> torch.Tensor:
        """Where everything is in one kind of image, for `write`; tensors without a place get 0.

        Offsets must be multiples of 16 bytes.
        """
        rows = list(self._tensors)
        for number, height, width, offset in places:
            rows[number] = (*rows[number][:3], height, width, offset)
        return torch.tensor(rows, dtype=torch.int64).to(self._device)

    def write(self, slot: int, image: torch.Tensor, table: torch.Tensor) -> None:
        """Fill `slot` from `image`, flat ``uint8`` on the same device, aligned to 16 bytes."""
        _scatter[(len(self._tiles),)](
            image.view(_MOVED_AS[self._item_bytes]),
            table,
            self._tiles,
            slot,
            item_bytes=self._item_bytes,
            aligned=self._aligned,
            tile_size=_TILE,
            num_warps=_WARPS,
        )


@triton.jit(do_not_specialize=["slot"])  # type: ignore[untyped-decorator]
def _scatter(  # type: ignore[no-untyped-def]
    image,
    places,
    tiles,
    slot,
    item_bytes: tl.constexpr,
    aligned: tl.constexpr,
    tile_size: tl.constexpr,
):
    tile = tl.program_id(0)
    place = places + tl.load(tiles + 2 * tile) * 6
    start = tl.load(tiles + 2 * tile + 1)
    address = tl.load(place)
    size = tl.load(place + 1)
    width = tl.load(place + 2).to(tl.int32)
    rows = tl.load(place + 3).to(tl.int32)
    columns = tl.load(place + 4).to(tl.int32)
    offset = tl.load(place + 5)
    address += slot * size * item_bytes
    if aligned:
        address = tl.multiple_of(address, 16)
        start = tl.multiple_of(start, 16)
        offset = tl.multiple_of(offset, 16 // item_bytes)
    target = address.to(tl.pointer_type(tl.int16 if item_bytes == 2 else tl.int32))
    index = start + tl.arange(0, tile_size)
    if columns == width:  # the common case: one run of numbers, which needs no division
        numbers = tl.load(image + offset + index, mask=index < rows * width, other=0)
    else:
        row = index // width
        column = index - row * width
        filled = (row < rows) & (column < columns)
        numbers = tl.load(image + offset + row * columns + column, mask=filled, other=0)
    tl.store(target + index, numbers, mask=index < size)
