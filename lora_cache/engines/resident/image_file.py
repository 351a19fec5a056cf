"""One image on disk: its bytes, then a footer that says what they are and what they add up to.

::

    image                 from byte 0 on, so that it is aligned to pages
    footer                msgpack: what it is of, and a checksum of each chunk of the image
    footer's length, its checksum, magic    24 bytes

What is torn, cut or flipped is noticed by the footer or by a chunk's checksum, so nothing needs to
be synced.  The checksums are XXH3 (https://github.com/Cyan4973/xxHash): as fast as memory, and no
help against forgers; the directory is its owner's alone.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from lora_cache.engines.resident.exact_io import read_exactly, write_exactly
from lora_cache.engines.resident.hands import ALONE, Hands
from lora_cache.engines.resident.layout import Contents

FORMAT = 1  #: raised whenever files of old mean something else

#: Read by one thread at a time: small enough that a cache holds it until it is summed up.
CHUNK_BYTES = 1 << 20

_TAIL = struct.Struct("<Q8s8s")
_MAGIC = b"lora-img"
_MAX_FOOTER_BYTES = 64 << 20


class DamagedImageError(Exception):
    """A file that is not what was written.  Never leaves the packer."""


class Footer(msgspec.Struct, frozen=True):
    """What an image is of.

    Attributes:
        layout: digest of the layout that it was packed for.
        key: digest of the adapter's key.
        sums: of each chunk, eight bytes each.
    """

    format: int
    layout: str
    key: str
    contents: Contents
    nbytes: int
    sums: bytes


class ImageFile:
    """An open image.  What has been removed since can still be read.

    Close it when it has been read.

    Attributes:
        contents: what it holds.
        nbytes: its size.

    Raises:
        DamagedImageError: it is not whole.
        OSError: it is not there, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self.footer = self._read_footer()
            self.contents, self.nbytes = self.footer.contents, self.footer.nbytes
        except (EOFError, ValueError, msgspec.DecodeError) as error:
            os.close(self.fd)
            raise DamagedImageError(f"{path}: {error}") from error
        except BaseException:
            os.close(self.fd)
            raise

    def _read_footer(self) -> Footer:
        size = os.fstat(self.fd).st_size
        if size < _TAIL.size:
            raise ValueError("it is cut")
        tail = memoryview(bytearray(_TAIL.size))
        read_exactly(self.fd, tail, size - _TAIL.size)
        length, promised, magic = _TAIL.unpack(tail)
        if magic != _MAGIC or length > min(_MAX_FOOTER_BYTES, size - _TAIL.size):
            raise ValueError("it has no footer")
        encoded = memoryview(bytearray(length))
        read_exactly(self.fd, encoded, size - _TAIL.size - length)
        if _sum(encoded) != promised:
            raise ValueError("its footer is damaged")
        footer = msgspec.msgpack.decode(encoded, type=Footer)
        chunks = -(-footer.nbytes // CHUNK_BYTES)
        if footer.format != FORMAT or len(footer.sums) != 8 * chunks:
            raise ValueError("it is of another format")
        if footer.nbytes + length + _TAIL.size != size:
            raise ValueError(f"it has {size} bytes, and its footer speaks of {footer.nbytes}")
        return footer

    def fill(self, out: memoryview, hands: Hands = ALONE) -> None:
        """Read the image into `out`, which is as long as it; after an error it holds anything.

        Raises:
            DamagedImageError: it is not what was written.
            OSError: it cannot be read.
        """
        sums = self.footer.sums

        def work(start: int) -> None:
            chunk = out[start : start + CHUNK_BYTES]
            read_exactly(self.fd, chunk, start)
            at = start // CHUNK_BYTES * 8
            if _sum(chunk) != sums[at : at + 8]:
                raise DamagedImageError(f"{self.path}: the bytes from {start} on are not its own")

        try:
            hands.do(work, range(0, self.nbytes, CHUNK_BYTES))
        except EOFError as error:
            raise DamagedImageError(f"{self.path}: {error}") from error

    def close(self) -> None:
        os.close(self.fd)


def write_image(fd: int, image: memoryview, layout: str, key: str, contents: Contents) -> None:
    """Write an image into an empty file.

    Raises:
        OSError: it cannot be written.
    """
    sums = bytearray()
    for start in range(0, len(image), CHUNK_BYTES):
        chunk = image[start : start + CHUNK_BYTES]
        sums += _sum(chunk)
        write_exactly(fd, chunk, start)
    footer = Footer(FORMAT, layout, key, contents, len(image), bytes(sums))
    encoded = msgspec.msgpack.encode(footer)
    tail = _TAIL.pack(len(encoded), _sum(encoded), _MAGIC)
    write_exactly(fd, encoded + tail, len(image))


def _sum(data: Any) -> bytes:
    return xxhash.xxh3_64_digest(data)
