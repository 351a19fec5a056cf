"""Messages on a byte stream: four bytes of length, big-endian, then msgpack of one tagged struct.

`frame` and `Frames` do no I/O: sockets, pipes and event loops alike feed what they have received.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

#: No message comes near it: a longer one is not ours.
MAX_FRAME_BYTES = 16 << 20

_LENGTH_BYTES = 4

_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


class WireError(Exception):
    """The peer speaks another language, or is damaged; the connection is of no more use."""


def frame(message: msgspec.Struct, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """A message as it goes over the stream.  Thread-safe."""
    body = _encoder.encode(message)
    if len(body) > max_bytes:
        raise WireError(f"a message of {len(body)} bytes; {max_bytes} are allowed")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class Frames(Generic[T]):
    """Turns received bytes into messages.  For one thread at a time."""

    def __init__(
        self, decoder: msgspec.msgpack.Decoder[T], max_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self._buffer = bytearray()
        self._decoder = decoder
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages that `data` completes.

        Raises:
            WireError: what came is no message.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if length > self._max_bytes:
                raise WireError(f"a frame of {length} bytes; {self._max_bytes} are allowed")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            try:
                yield self._decoder.decode(body)
            except msgspec.DecodeError as error:
                raise WireError(f"not one of our messages: {error}") from error

    @property
    def is_torn(self) -> bool:
        """Whether the stream may not end here: a frame is incomplete."""
        return bool(self._buffer)
