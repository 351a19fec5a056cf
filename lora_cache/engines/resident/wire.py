"""What the manager and the agents in vLLM's workers say to each other, and how.

A Unix stream socket that carries frames (`framing`); the end of the stream means that the peer is
gone.  `Channel` is for a thread; an event loop feeds a `Frames` itself.
"""

from __future__ import annotations

import socket
import threading

import msgspec

from lora_cache.engines.resident import framing
from lora_cache.engines.resident.framing import WireError as WireError
from lora_cache.engines.resident.layout import Contents

#: Changed whenever a message changes its meaning; both sides refuse another one.
PROTOCOL = 3

#: Names of LoRARequests that are none: through vLLM's public ``add_lora`` they reach every worker.
#: The path of the first is the manager's socket.
ATTACH = "lora_cache:attach"
DETACH = "lora_cache:detach"


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent, once, after `Hello`: where the images are."""

    arena_path: str  #: a file that the agent may map, such as ``/proc/<pid>/fd/<n>`` of a memfd
    arena_bytes: int


class Load(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: write an image into a slot and publish it; answered by Done or Failed."""

    op: int
    lora_id: int
    slot: int
    offset: int  #: of the image in the arena
    nbytes: int
    contents: Contents
    displaces: int = 0  #: the id that the manager believes to be in that slot; 0 for none


class LoadNative(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: the same for an adapter that no image can hold, by vLLM's own loader.

    What the loader made is kept in the worker's memory, and not read again, until `Unload` says
    otherwise.  Answered by Done or Failed.
    """

    op: int
    lora_id: int
    slot: int  #: -1: only read it
    path: str
    displaces: int = 0


class Unload(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: publish these no longer; ids that are not published are no error."""

    op: int
    lora_ids: list[int]
    forget: bool = False  #: what vLLM's loader made of them, too


class PageLock(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: an image is complete, make it ready for fast copying.

    It stays where it is until `PageUnlock`.  Other operations go on meanwhile.  Answered by Done
    or Failed.
    """

    op: int
    offset: int
    nbytes: int


class PageUnlock(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: these images are to go; once it is Done, their bytes are the manager's."""

    op: int
    offsets: list[int]


class Report(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: what is where?  Answered by `Holding`."""

    op: int


class Bye(msgspec.Struct, tag=True, frozen=True):
    """Manager → agent: give the slots back to vLLM and close."""


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Agent → manager, first of all."""

    rank: int
    world_size: int
    pid: int
    device: str
    max_loras: int
    layout: bytes  #: msgpack of the worker's slot layout
    image_bytes: int  #: of the largest image that fits a slot
    protocol: int = PROTOCOL


class Done(msgspec.Struct, tag=True, frozen=True):
    """Agent → manager: the operation has happened.  Times are in seconds."""

    op: int
    seconds: float  #: from the command's arrival on
    waited: float = 0.0  #: for the steps that still read the slot
    copied: float = 0.0  #: the image across the bus
    scattered: float = 0.0  #: it into the slot


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Agent → manager: it has not, and the newcomer is not published.

    What it was to displace may or may not be gone: ask with `Report`.
    """

    op: int
    message: str


class Holding(msgspec.Struct, tag=True, frozen=True):
    """Agent → manager: the published id of each slot, 0 for none."""

    op: int
    slots: list[int]
    native: list[int]  #: ids that `LoadNative` has read, and that are kept
    recent: list[int]  #: those in `slots` that a batch has needed a moment ago


class Displaced(msgspec.Struct, tag=True, frozen=True):
    """Agent → manager, unasked: a slot changed without the manager's word.

    A batch held an adapter that nobody had brought in, or somebody used vLLM's own API.
    """

    slot: int
    old_id: int  #: 0: the slot was free
    new_id: int  #: 0: the slot is free now
    seconds: float  #: that the step loop stood still for it


ToAgent = Welcome | Load | LoadNative | Unload | PageLock | PageUnlock | Report | Bye
ToManager = Hello | Done | Failed | Holding | Displaced
Message = ToAgent | ToManager

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The frame of a message.  Thread-safe."""
    return framing.frame(message)


class Frames(framing.Frames[Message]):
    """Turns what one connection brings into messages.  For one thread at a time."""

    def __init__(self) -> None:
        super().__init__(_decoder)


class Channel:
    """A connected socket for threads.

    `send` may be called from any thread; `receive` from one at a time.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._frames = Frames()
        self._ready: list[Message] = []
        self._sending = threading.Lock()

    @classmethod
    def connect(cls, path: str, timeout_s: float = 5.0) -> Channel:
        """Connect to the socket at `path`.

        Raises:
            OSError: nobody listens there.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(timeout_s)
            connected.connect(path)
            connected.settimeout(None)
        except OSError:
            connected.close()
            raise
        return cls(connected)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_message(self) -> bool:
        """Whether `receive` would return at once: readiness of the socket does not say it."""
        return bool(self._ready)

    def send(self, message: Message) -> None:
        """Send, waiting while the peer does not read.

        Raises:
            OSError: the peer is gone.
        """
        frame = encode(message)
        with self._sending:
            self._socket.sendall(frame)

    def receive(self) -> Message:
        """The next message; waits for it.

        Raises:
            EOFError: the peer closed, or `shut_down` was called.
            OSError: the connection broke.
            WireError: what came is no message.
        """
        while not self._ready:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("in the middle of a message" if self._frames.is_torn else "closed")
            self._ready.extend(self._frames.feed(data))
        return self._ready.pop(0)

    def shut_down(self) -> None:
        """End both directions: a thread that waits in `receive` or `send` wakes."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    def close(self) -> None:
        self._socket.close()
