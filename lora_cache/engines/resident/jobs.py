"""What the manager and its packer say to each other, over the packer's standard streams."""

from __future__ import annotations

import msgspec

from lora_cache.engines.resident.framing import Frames, frame
from lora_cache.engines.resident.layout import Contents, Layout
from lora_cache.manifest import Stamp

_MAX_BYTES = 1 << 30  # the layouts of a large mixture on many workers are one message


class Wanted(msgspec.Struct, frozen=True):
    """An adapter whose images are wanted.

    Attributes:
        directory: where its files are.
        key: the digest of its `AdapterKey`; empty: its images are neither looked for nor kept.
        stamp: of the files when they were found to be those of the key.
        urgent: somebody waits for it; what is only prefetched comes after.
    """

    directory: str
    key: str = ""
    stamp: Stamp = ()
    urgent: bool = True


class Layouts(msgspec.Struct, tag=True, frozen=True):
    """First of all: what to pack for, one layout a worker, in the order of their ranks."""

    layouts: list[Layout]


class Examine(msgspec.Struct, tag=True, frozen=True):
    """What will the images of an adapter hold?  Answered by `Sizes`."""

    job: int
    wanted: Wanted


class Pack(msgspec.Struct, tag=True, frozen=True):
    """Write the images into the arena at these offsets, one a worker.  Answered by `Packed`."""

    job: int
    wanted: Wanted
    offsets: list[int]
    nbytes: list[int]


class Populate(msgspec.Struct, tag=True, frozen=True):
    """Have the pages at these offsets ready for an image to come.  Answered by `Populated`."""

    job: int
    offsets: list[int]
    nbytes: list[int]


class Sizes(msgspec.Struct, tag=True, frozen=True):
    """Contents and bytes of the images, one a worker."""

    job: int
    contents: list[Contents]
    nbytes: list[int]


class Packed(msgspec.Struct, tag=True, frozen=True):
    """The images are in the arena.

    Attributes:
        read: how many of them were kept on disk, and only had to be read.
        saving: the packer still reads them, to keep them on disk: it says `Saved` when it is done.
    """

    job: int
    seconds: float
    read: int = 0
    saving: bool = False


class Populated(msgspec.Struct, tag=True, frozen=True):
    """The pages are there, as far as there is memory."""

    job: int


class Saved(msgspec.Struct, tag=True, frozen=True):
    """The packer has no more to do with the images, whether they could be kept or not."""

    job: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The job cannot be done.

    Attributes:
        unknown: the packer does not know this kind of adapter, so vLLM's loader has its say;
            otherwise its files are damaged.
    """

    job: int
    message: str
    unknown: bool


Job = Layouts | Examine | Pack | Populate
Answer = Sizes | Packed | Populated | Saved | Refused

_jobs: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Job | Answer) -> bytes:
    """The frame of a message.  Thread-safe."""
    return frame(message, _MAX_BYTES)


def job_frames() -> Frames[Job]:
    """What the packer reads with."""
    return Frames(_jobs, _MAX_BYTES)


def answer_frames() -> Frames[Answer]:
    """What the manager reads with."""
    return Frames(_answers, _MAX_BYTES)
