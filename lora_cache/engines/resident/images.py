"""From the shared arena into a slot, without the step loop noticing."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from lora_cache.engines.resident.layout import Contents

#: cudaHostRegister's flag for memory that every context may use.
_PORTABLE = 1


class SlotWriter(Protocol):
    """Scatters images into slots."""

    def write(self, slot: int, image: torch.Tensor, contents: Contents) -> None:
        """Write `image`, flat uint8 on the slots' device, on the current stream.

        The whole slot is defined afterwards, whatever it held before.
        """


class Parts(NamedTuple):
    """What a worker needs to know of its own slots."""

    writer: SlotWriter
    layout: bytes  #: msgpack; what an image has to look like
    image_bytes: int  #: of the largest image
    read_native: Callable[[int, str], Any]  #: has vLLM's loader read an adapter: its id and path
    write_native: Callable[[int, Any], None]  #: writes a slot from what that made


class ImageWriter:
    """Maps the arena and writes images from it.  Made, used and closed by the agent thread.

    On a GPU the arena is page-locked, an image crosses the bus in one copy on a stream of its own,
    and a scatter on the same stream brings it into the slot.

    Args:
        path: the arena; only mapped, so it may be another process's.
        nbytes: its size.

    Raises:
        OSError: it cannot be mapped.
        ValueError: it is smaller than `nbytes`.
        RuntimeError: CUDA refuses to page-lock it.
    """

    def __init__(self, path: str, nbytes: int, parts: Parts, device: torch.device) -> None:
        self._parts = parts
        self._device = device
        self._map = _map(path, nbytes)
        self._arena: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)
        self._stream: Any = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            _check(torch.cuda.cudart().cudaHostRegister(self._arena.data_ptr(), nbytes, _PORTABLE))
            self._stream = torch.cuda.Stream(device)
            self._staging = torch.empty(parts.image_bytes, dtype=torch.uint8, device=device)

    def write(self, slot: int, offset: int, nbytes: int, contents: Contents) -> None:
        """Write the image at `offset`; returns when the slot holds it.

        Raises:
            ValueError: there is no such image.
        """
        if self._arena is None:
            raise ValueError("the arena is closed")
        if offset < 0 or not 0 < nbytes <= min(
            self._parts.image_bytes, self._arena.numel() - offset
        ):
            raise ValueError(
                f"{nbytes} bytes at {offset} of an arena of {self._arena.numel()}; "
                f"an image has at most {self._parts.image_bytes}"
            )
        with torch.inference_mode():  # as the slots were made
            image = self._arena[offset : offset + nbytes]
            if self._stream is None:
                self._parts.writer.write(slot, image, contents)
                return

            def write() -> None:
                staged = self._staging[: image.numel()]
                staged.copy_(image, non_blocking=True)
                self._parts.writer.write(slot, staged, contents)

            self._on_stream(write)

    def write_native(self, slot: int, model: Any) -> None:
        """Write what vLLM's loader made; returns when the slot holds it."""
        with torch.inference_mode():
            self._on_stream(lambda: self._parts.write_native(slot, model))

    def _on_stream(self, queue: Callable[[], None]) -> None:
        if self._stream is None:
            queue()
            return
        with torch.cuda.stream(self._stream):
            queue()
            written = torch.cuda.Event(blocking=True)  # waits without a core and without the GIL
            written.record(self._stream)
        written.synchronize()

    def close(self) -> None:
        """Unmap.  Idempotent."""
        if self._arena is None:
            return
        if self._stream is not None:
            self._stream.synchronize()
            _check(torch.cuda.cudart().cudaHostUnregister(self._arena.data_ptr()))
        self._arena = None  # a map with a view of it cannot be closed
        self._map.close()


def _map(path: str, nbytes: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size < nbytes or nbytes <= 0:
            raise ValueError(f"the arena has {size} bytes, not {nbytes}")
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _check(status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(f"CUDA cannot page-lock the arena: error {int(status)}")
