"""A safetensors file, read in pieces: straight into memory of the caller's where that will do.

The format: eight bytes of length, little-endian, a JSON object of that length, then the tensors'
bytes (https://github.com/huggingface/safetensors, README).  The library's own reader makes three
objects a tensor and maps its pages one by one; here a tensor costs one system call.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from lora_cache.errors import CannotPackError, InvalidAdapterError
from lora_cache.exact_io import read_exactly

_HEAD_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as the library has it
_MAX_BUFFERS = 512  # that one call fills; Linux has 1024

#: torch's names, and bytes an element.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
}


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Said(msgspec.Struct, frozen=True):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        dtype: torch's name of it.
        start: first byte in the file.
        nbytes: how many.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class WeightsFile:
    """An open file; its header has been checked against its length.

    Thread-safe.  Close it when nobody reads any more.

    Raises:
        InvalidAdapterError: it cannot be read, or is no whole safetensors file.
        CannotPackError: a tensor is of a dtype that is not known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidAdapterError(f"{path} cannot be read: {error.strerror}") from error
        self._map: mmap.mmap | None = None
        try:
            self.tensors = self._read_header()
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            os.close(self._fd)
            raise InvalidAdapterError(f"{path} cannot be read: {error}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self) -> dict[str, Tensor]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, _HEAD_BYTES, 0), "little")
        if length > min(_MAX_HEADER_BYTES, size - _HEAD_BYTES):
            raise ValueError("it is no safetensors file, or its header is cut")
        raw = msgspec.json.decode(os.pread(self._fd, length, _HEAD_BYTES), type=dict)
        raw.pop("__metadata__", None)
        header = msgspec.convert(raw, dict[str, _Said])
        found = {name: _tensor(name, said, length) for name, said in header.items()}
        end = max((tensor.start + tensor.nbytes for tensor in found.values()), default=0)
        if end > size:
            raise ValueError(f"it has {size} bytes, and its header speaks of {end}")
        return found

    def read(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each buffer with the bytes from its place in the file on.

        Neighbours in the file that follow each other are read in one go.

        Raises:
            InvalidAdapterError: the file has been cut since, or the disk fails.
        """
        try:
            for start, buffers in _in_one_go(pieces):
                if os.preadv(self._fd, buffers, start) != sum(map(len, buffers)):
                    for buffer in buffers:  # the system may do less than asked
                        read_exactly(self._fd, buffer, start)
                        start += len(buffer)
        except EOFError as error:
            raise InvalidAdapterError(f"{self.path} was cut while it was read") from error
        except OSError as error:
            raise InvalidAdapterError(f"{self.path} cannot be read: {error.strerror}") from error

    def mapped(self) -> mmap.mmap:
        """The whole file in memory, for what has to be rearranged."""
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        return self._map

    def close(self) -> None:
        # A map that somebody still looks at goes with the last who does.
        os.close(self._fd)


def _tensor(name: str, said: _Said, header_bytes: int) -> Tensor:
    if said.dtype not in _DTYPES:
        raise CannotPackError(f"{name} is of dtype {said.dtype}")
    dtype, item_bytes = _DTYPES[said.dtype]
    begin, end = said.data_offsets
    nbytes = math.prod(said.shape) * item_bytes
    if end - begin != nbytes:
        raise ValueError(f"the header contradicts itself about {name}")
    return Tensor(dtype, said.shape, _HEAD_BYTES + header_bytes + begin, nbytes)


def _in_one_go(
    pieces: Sequence[tuple[int, memoryview]],
) -> Iterator[tuple[int, list[memoryview]]]:
    first, end, buffers = 0, -1, list[memoryview]()
    for start, buffer in pieces:
        if start != end or len(buffers) == _MAX_BUFFERS:
            if buffers:
                yield first, buffers
            first, buffers = start, []
        buffers.append(buffer)
        end = start + len(buffer)
    if buffers:
        yield first, buffers
