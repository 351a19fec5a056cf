"""What the manager and its packer say to each other, over the packer's standard streams.

Frames as on the workers' sockets: four bytes of length, big-endian, then msgpack of a struct.
"""

from __future__ import annotations

import asyncio
from typing import BinaryIO, TypeVar

import msgspec

from lora_cache.engines.resident.layout import Contents, Layout

_LENGTH_BYTES = 4

T = TypeVar("T")


class Layouts(msgspec.Struct, tag=True, frozen=True):
    """First of all: what to pack for, one layout a worker, in the order of their ranks."""

    layouts: list[Layout]


class Examine(msgspec.Struct, tag=True, frozen=True):
    """What will the images of an adapter hold?  Answered by `Sizes`."""

    job: int
    directory: str


class Pack(msgspec.Struct, tag=True, frozen=True):
    """Write the images into the arena at these offsets, one a worker.  Answered by `Packed`."""

    job: int
    directory: str
    offsets: list[int]
    nbytes: list[int]


class Sizes(msgspec.Struct, tag=True, frozen=True):
    """Contents and bytes of the images, one a worker."""

    job: int
    contents: list[Contents]
    nbytes: list[int]


class Packed(msgspec.Struct, tag=True, frozen=True):
    """The images are in the arena."""

    job: int
    seconds: float


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The job cannot be done.

    Attributes:
        unknown: the packer does not know this kind of adapter, so vLLM's loader has its say;
            otherwise its files are damaged.
    """

    job: int
    message: str
    unknown: bool


Job = Layouts | Examine | Pack
Answer = Sizes | Packed | Refused

JOBS: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def frame(message: Job | Answer) -> bytes:
    """A message as it goes over the stream."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def read(stream: BinaryIO, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, or None at the end of the stream."""
    head = stream.read(_LENGTH_BYTES)
    body = stream.read(int.from_bytes(head, "big"))
    return decoder.decode(body) if body else None


async def receive(stream: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, or None at the end of the stream: the packer has died."""
    try:
        head = await stream.readexactly(_LENGTH_BYTES)
        return decoder.decode(await stream.readexactly(int.from_bytes(head, "big")))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
