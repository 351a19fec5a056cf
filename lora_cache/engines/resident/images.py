"""From the shared arena into a slot, without the step loop noticing."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from lora_cache.engines.resident.layout import Contents
from lora_cache.engines.resident.page_locks import PageLocks


class SlotWriter(Protocol):
    """Scatters images into slots."""

    def write(self, slot: int, image: torch.Tensor, contents: Contents) -> None:
        """Write `image`, flat uint8 on the slots' device, on the current stream.

        The whole slot is defined afterwards, whatever it held before.
        """

    def clear(self, slot: int) -> None:
        """Fill a slot with zeros, in the same way."""


class Parts(NamedTuple):
    """What a worker needs to know of its own slots."""

    writer: SlotWriter
    layout: bytes  #: msgpack; what an image has to look like
    image_bytes: int  #: of the largest image
    read_native: Callable[[int, str], Any]  #: has vLLM's loader read an adapter: its id and path
    write_native: Callable[[int, Any], None]  #: writes a slot from what that made
    #: Room for an image beside the slots; none where slots are in host memory.
    staging: torch.Tensor | None = None


class Written(NamedTuple):
    """How long the parts of a write took on the device, in seconds."""

    copied: float = 0.0  #: across the bus
    scattered: float = 0.0  #: into the slot


class ImageWriter:
    """Maps the arena and writes images from it.

    On a GPU an image is page-locked first, then crosses the bus on a stream of its own, and a
    scatter on the same stream brings it into the slot.

    `write` and `write_native` are the agent thread's; `lock` and `unlock` may be another's, one at
    a time.  `close` comes after all of them.

    Args:
        path: the arena; only mapped, so it may be another process's.
        nbytes: its size.

    Raises:
        OSError: it cannot be mapped.
        ValueError: it is smaller than `nbytes`.
    """

    def __init__(self, path: str, nbytes: int, parts: Parts, device: torch.device) -> None:
        self._parts = parts
        self._device = device
        self._map = _map(path, nbytes)
        self._arena: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)
        self._stream: Any = None
        self._locks: PageLocks | None = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)
            self._locks = PageLocks(self._arena.data_ptr())
            if parts.staging is None:
                size = parts.image_bytes
                self._parts = parts._replace(
                    staging=torch.empty(size, dtype=torch.uint8, device=device)
                )

    def lock(self, offset: int, nbytes: int) -> None:
        """Page-lock an image: it is complete, and stays where it is until `unlock`.

        Raises:
            ValueError: there is no such image.
        """
        self._check(offset, nbytes)
        if self._locks is not None:
            torch.cuda.set_device(self._device)  # a thread's first call to CUDA
            self._locks.lock(offset, nbytes)

    def unlock(self, offset: int) -> None:
        """Undo `lock`: what lies there may be overwritten and given back."""
        if self._locks is not None:
            self._locks.unlock(offset)

    def write(self, slot: int, offset: int, nbytes: int, contents: Contents) -> Written:
        """Write the image at `offset`; returns when the slot holds it.

        Raises:
            ValueError: there is no such image.
        """
        arena = self._check(offset, nbytes)
        staging, locks, writer = self._parts.staging, self._locks, self._parts.writer
        if staging is None or locks is None:
            image = arena[offset : offset + nbytes]
            return self._queue(lambda: None, lambda: writer.write(slot, image, contents))

        def copy() -> None:
            for start, length in locks.pieces(offset, nbytes):
                staged = staging[start - offset : start - offset + length]
                staged.copy_(arena[start : start + length], non_blocking=True)

        return self._queue(copy, lambda: writer.write(slot, staging[:nbytes], contents))

    def write_native(self, slot: int, model: Any) -> Written:
        """Write what vLLM's loader made; returns when the slot holds it."""
        return self._queue(lambda: None, lambda: self._parts.write_native(slot, model))

    def _queue(self, copy: Callable[[], None], scatter: Callable[[], None]) -> Written:
        with torch.inference_mode():  # as the slots were made
            if self._stream is None:
                began = time.perf_counter()
                copy()
                scatter()
                return Written(scattered=time.perf_counter() - began)
            # Blocking: it waits without a core, and without the interpreter lock.
            start, copied, done = (
                torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(3)
            )
            with torch.cuda.stream(self._stream):
                start.record(self._stream)
                copy()
                copied.record(self._stream)
                scatter()
                done.record(self._stream)
            done.synchronize()
            return Written(start.elapsed_time(copied) / 1e3, copied.elapsed_time(done) / 1e3)

    def _check(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._arena is None:
            raise ValueError("the arena is closed")
        if offset < 0 or not 0 < nbytes <= min(
            self._parts.image_bytes, self._arena.numel() - offset
        ):
            raise ValueError(
                f"{nbytes} bytes at {offset} of an arena of {self._arena.numel()}; "
                f"an image has at most {self._parts.image_bytes}"
            )
        return self._arena

    def close(self) -> None:
        """Unmap.  Idempotent."""
        if self._arena is None:
            return
        if self._stream is not None:
            self._stream.synchronize()
        if self._locks is not None:
            self._locks.close()
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
