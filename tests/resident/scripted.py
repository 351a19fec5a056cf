"""A scripted manager on a real socket, and the simplest slot image: all of a slot, as it is."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lora_cache.engines.resident.images import Parts
from lora_cache.engines.resident.layout import Contents
from lora_cache.engines.resident.wire import (
    Bye,
    Channel,
    Displaced,
    Done,
    Failed,
    Hello,
    Holding,
    Load,
    Message,
    Report,
    Unload,
    Welcome,
)


def slot_tensors(manager: Any, slot: int) -> list[torch.Tensor]:
    found = []
    for module in manager.modules.values():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            held = getattr(module, name, ())
            for tensor in (held,) if isinstance(held, torch.Tensor) else held:
                found.append(tensor[slot])
    return found


def image_of(manager: Any, slot: int) -> torch.Tensor:
    parts = [t.contiguous().view(-1).view(torch.uint8) for t in slot_tensors(manager, slot)]
    return torch.cat(parts)


class WholeSlotWriter:
    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.before_write: Callable[[], object] = lambda: None

    def write(self, slot: int, image: torch.Tensor, contents: Contents) -> None:
        self.before_write()
        offset = 0
        for tensor in slot_tensors(self.manager, slot):
            nbytes = tensor.numel() * tensor.element_size()
            piece = image[offset : offset + nbytes].view(tensor.dtype)
            tensor.copy_(piece.view(tensor.shape))
            offset += nbytes
        assert offset == image.numel()

    def clear(self, slot: int) -> None:
        for tensor in slot_tensors(self.manager, slot):
            tensor.zero_()


def whole_slot_parts(worker: Any) -> Parts:
    from lora_cache.engines.resident.worker import parts_of  # imports vLLM

    manager = worker._adapter_manager
    nbytes = image_of(manager, 0).numel()
    real = parts_of(worker)
    return real._replace(writer=WholeSlotWriter(manager), layout=b"test layout", image_bytes=nbytes)


class ScriptedManager:
    """Says what a test tells it to say; what it hears unasked is in `displaced`."""

    def __init__(self, images: dict[int, torch.Tensor]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="lc-"))
        self.path = str(self.directory / "agent")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self.images = images
        self.offsets: dict[int, int] = {}
        self.displaced: list[Displaced] = []
        self.op = 0
        total = sum(image.numel() for image in images.values())
        self.arena = os.memfd_create("arena")
        os.ftruncate(self.arena, total)
        with mmap.mmap(self.arena, total) as mapped:
            for lora_id, image in images.items():
                self.offsets[lora_id] = mapped.tell()
                mapped.write(image.numpy().tobytes())
        self.total = total
        self.channel: Channel | None = None

    def __enter__(self) -> ScriptedManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.channel:
            self.channel.close()
        self._listener.close()
        os.close(self.arena)
        shutil.rmtree(self.directory)

    def welcome(self) -> Hello:
        connected, _ = self._listener.accept()
        connected.settimeout(20)
        self.channel = Channel(connected)
        hello = self.channel.receive()
        assert isinstance(hello, Hello)
        self.channel.send(Welcome(f"/proc/{os.getpid()}/fd/{self.arena}", self.total))
        return hello

    def answer(self) -> Message:
        assert self.channel
        while isinstance(message := self.channel.receive(), Displaced):
            self.displaced.append(message)
        return message

    def load(self, lora_id: int, slot: int, displaces: int = 0, **changes: Any) -> Done | Failed:
        assert self.channel
        self.op += 1
        offset, nbytes = self.offsets[lora_id], self.images[lora_id].numel()
        fields = {
            "offset": offset,
            "nbytes": nbytes,
            "contents": Contents(16, b""),
            "displaces": displaces,
            **changes,
        }
        self.channel.send(Load(op=self.op, lora_id=lora_id, slot=slot, **fields))
        answer = self.answer()
        assert isinstance(answer, Done | Failed)
        assert answer.op == self.op
        return answer

    def unload(self, *lora_ids: int) -> None:
        assert self.channel
        self.op += 1
        self.channel.send(Unload(self.op, list(lora_ids)))
        assert isinstance(self.answer(), Done)

    def holding(self) -> list[int]:
        assert self.channel
        self.op += 1
        self.channel.send(Report(self.op))
        answer = self.answer()
        assert isinstance(answer, Holding)
        return answer.slots

    def bye(self) -> None:
        assert self.channel
        self.channel.send(Bye())


def agents() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lora-cache-agent"]
