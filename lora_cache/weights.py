"""Are all weights finite?  Reads every byte of an adapter, so it is done on request only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from lora_cache.errors import InvalidAdapterError
from lora_cache.manifest import WEIGHTS_FILE

_CHUNK_BYTES = 4 << 20

# A float is infinite or NaN when all bits of its exponent are set (IEEE 754; bfloat16 is float32's
# upper half, numpy does not know it, so bits are looked at).  E4M3 has no infinity, and as NaN
# only all bits but the sign.
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
}


def check_finite(directory: Path) -> None:
    """Refuse an adapter with an infinity or a NaN in it.

    Memory is flat, whatever the file's size; a cold file is read at the disk's speed.

    Args:
        directory: an adapter that `read_manifest` accepts.

    Raises:
        InvalidAdapterError: names the first tensor that is not finite.
    """
    path = directory / WEIGHTS_FILE
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                if not _is_finite(file.fileno(), 8 + length + begin, end - begin, tensor["dtype"]):
                    raise InvalidAdapterError(
                        f"{path}: {name} holds NaN or infinity, so every answer would be noise: "
                        "train the adapter again, or leave check_weights off"
                    )
    except (OSError, ValueError, KeyError, TypeError) as error:  # changed since it was accepted
        raise InvalidAdapterError(f"{path} cannot be read: {error}") from error


def _is_finite(descriptor: int, offset: int, nbytes: int, dtype: str) -> bool:
    kind, exponent = _EXPONENTS.get(dtype, ("", 0))
    if not kind:
        return True  # integers
    for start in range(offset, offset + nbytes, _CHUNK_BYTES):
        raw = os.pread(descriptor, min(_CHUNK_BYTES, offset + nbytes - start), start)
        bits = np.frombuffer(raw, kind)
        if np.any((bits & bits.dtype.type(exponent)) == exponent):
            return False
    return True
