"""A safetensors file, read in pieces: straight into memory of the caller's where that will do.

The format: eight bytes of length, little-endian, a JSON object of that length, then the tensors'
bytes (https://github.com/huggingface/safetensors, README).  The library's own reader makes three
objects a tensor and maps its pages one by one; here a tensor costs one system call.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cache.engines.resident.exact_io import read_exactly
from lora_cache.errors import CannotPackError, InvalidAdapterError

_HEAD_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as the library has it

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
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        header = json.loads(os.pread(self._fd, length, _HEAD_BYTES))
        header.pop("__metadata__", None)
        found = {name: _tensor(name, said, length) for name, said in header.items()}
        end = max((tensor.start + tensor.nbytes for tensor in found.values()), default=0)
        if end > size:
            raise ValueError(f"it has {size} bytes, and its header speaks of {end}")
        return found

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `start` on.

        Raises:
            InvalidAdapterError: the file has been cut since, or the disk fails.
        """
        try:
            read_exactly(self._fd, out, start)
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


def _tensor(name: str, said: Any, header_bytes: int) -> Tensor:
    if said["dtype"] not in _DTYPES:
        raise CannotPackError(f"{name} is of dtype {said['dtype']}")
    dtype, item_bytes = _DTYPES[said["dtype"]]
    begin, end = said["data_offsets"]
    shape = tuple(said["shape"])
    nbytes = math.prod(shape) * item_bytes
    if begin < 0 or end - begin != nbytes or min(shape, default=0) < 0:
        raise ValueError(f"the header contradicts itself about {name}")
    return Tensor(dtype, shape, _HEAD_BYTES + header_bytes + begin, nbytes)
