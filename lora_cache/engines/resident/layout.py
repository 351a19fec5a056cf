"""What one worker's slot looks like, and where each piece of it lies in an adapter's image.

The image of an adapter is one flat run of bytes: for every module that the adapter targets, the
very numbers that vLLM would put in the slot (slot dtype, scaling merged into ``B``, this tensor-
parallel rank's share), at the adapter's own rank and not at the slot's.  Modules that an adapter
does not target are absent: most adapters leave most modules out, and host memory and the transfer
are paid by the byte.  So an image is described by its `Contents`: its rank, and what is present.

Needs neither torch nor vLLM: the packer, the store and the planner read layouts too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property

import msgspec

from lora_cache.engines.resident.names import Matrix, Renames

#: Pieces start at multiples of this many bytes: a cache line, and enough for wide GPU loads.
ALIGNMENT = 64

FORMAT = 1  #: raised whenever the same layout would mean other bytes

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_MOST_PLACED = 64  # kinds of contents whose places are remembered


class Piece(msgspec.Struct, frozen=True):
    """One tensor of a slot, and the part of an adapter's matrix that belongs there.

    Attributes:
        module: the LoRA layer's name, e.g. ``model.layers.0.self_attn.qkv_proj``.
        index: which of its stacked tensors, or None where it has a single one.
        matrix: ``A`` (``lora_a_stacked``) or ``B`` (``lora_b_stacked``).
        source: index of the adapter's module in `Layout.sources`.
        rank_first: in the slot, rows are ranks and columns are the width; else the reverse.
        width: length of the adapter's matrix along the axis that is not the rank.
        width_is_exact: another width would be cut differently; else a longer one is cut alike.
        spans: (start, stop) of what is taken along that axis, joined in this order.
        rank_start: the first rank that this worker holds: not 0 only with fully sharded LoRAs.
        rank_stop: the first one that it does not.
    """

    module: str
    index: int | None
    matrix: Matrix
    source: int
    rank_first: bool
    width: int
    width_is_exact: bool
    spans: tuple[tuple[int, int], ...]
    rank_start: int
    rank_stop: int

    @property
    def length(self) -> int:
        """How long the piece is along the axis that is not the rank."""
        return sum(stop - start for start, stop in self.spans)

    def ranks(self, rank: int) -> int:
        """How many ranks this worker holds of an adapter of `rank` ranks."""
        return max(0, min(rank, self.rank_stop) - self.rank_start)

    def shape(self, rank: int) -> tuple[int, int]:
        """Its shape in the image, and in the corner of the slot's tensor."""
        ranks = self.ranks(rank)
        return (ranks, self.length) if self.rank_first else (self.length, ranks)


class Contents(msgspec.Struct, frozen=True):
    """What an image holds: with a `Layout`, it says where everything is.

    Attributes:
        rank: the largest rank among its modules; smaller ones are padded with zeros.
        present: one bit per `Layout.sources`, the lowest of the first byte first.
    """

    rank: int
    present: bytes

    @classmethod
    def of(cls, rank: int, sources: set[int], count: int) -> Contents:
        """An image of `rank` with these of `count` sources."""
        bits = sum(1 << source for source in sources)
        return cls(rank, bits.to_bytes((count + 7) // 8, "little"))

    def has(self, source: int) -> bool:
        return bool(self.present[source >> 3] >> (source & 7) & 1)


class Placed(msgspec.Struct, frozen=True):
    """A piece that an image holds.

    Attributes:
        number: its index in `Layout.pieces`.
        offset: where it starts, in bytes.
        shape: rows and columns, contiguous.
    """

    number: int
    offset: int
    shape: tuple[int, int]


class Layout(msgspec.Struct, frozen=True, dict=True):
    """One worker's slot.

    Attributes:
        vllm_version: whose slots these are.
        dtype: of all slot tensors, e.g. ``bfloat16``.
        tp_rank: this worker's tensor-parallel rank.
        tp_size: of how many.
        fully_sharded: are both matrices sharded (vLLM's ``fully_sharded_loras``)?
        max_rank: the largest rank that fits.
        vocab_size: what an adapter of the embedding table must have.
        honours_patterns: does this vLLM honour rank_pattern and alpha_pattern (0.32 does)?
        sources: the adapter modules that have a place in the slot, by vLLM's names.
        pieces: every tensor of a slot that the packer fills.
        slow: modules that only vLLM's loader can fill (mixtures of experts, classification
            heads): an adapter that targets one of them, or a module below it, takes the slow path.
        resets: LoRA layers without pieces: `reset_lora` empties them.
        expected: last parts of module names that vLLM accepts; it ignores such modules where the
            model has none of the full name.
        skip_prefixes: modules that vLLM leaves out.
        renames: from checkpoint names to vLLM's.
        refusal: why no adapter at all can be packed for this model, or None.
    """

    vllm_version: str
    dtype: str
    tp_rank: int
    tp_size: int
    fully_sharded: bool
    max_rank: int
    vocab_size: int
    honours_patterns: bool
    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]
    slow: tuple[str, ...] = ()
    resets: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    skip_prefixes: tuple[str, ...] = ()
    renames: Renames = Renames()
    refusal: str | None = None

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @cached_property
    def digest(self) -> str:
        """Equal digests mean that one worker's image is right for the other: 32 hex digits."""
        encoded = msgspec.json.encode((FORMAT, self))
        return hashlib.sha256(encoded).hexdigest()[:32]

    def place(self, contents: Contents) -> tuple[Placed, ...]:
        """Every piece of such an image that is not empty, in the order of offsets.

        Thread-safe; remembered, for most adapters are like the last one.
        """
        known: dict[Contents, tuple[Placed, ...]] = self.__dict__.setdefault("placed", {})
        found = known.get(contents)
        if found is None:
            if len(known) >= _MOST_PLACED:
                known.clear()
            found = known[contents] = tuple(self._place(contents))
        return found

    def _place(self, contents: Contents) -> Iterator[Placed]:
        offset = 0
        for number, piece in enumerate(self.pieces):
            if contents.has(piece.source):
                rows, columns = shape = piece.shape(contents.rank)
                if rows and columns:
                    yield Placed(number, offset, shape)
                    offset += self._nbytes_of(shape)

    def nbytes(self, contents: Contents) -> int:
        """Bytes of such an image: a multiple of `ALIGNMENT`."""
        placed = self.place(contents)
        return placed[-1].offset + self._nbytes_of(placed[-1].shape) if placed else 0

    def _nbytes_of(self, shape: tuple[int, int]) -> int:
        return _aligned(shape[0] * shape[1] * self.item_bytes)

    def max_nbytes(self, rank: int) -> int:
        """Bytes of the image of an adapter of `rank` that targets every module."""
        return self.nbytes(self.everything(rank))

    def everything(self, rank: int) -> Contents:
        """The contents of an image with every module present."""
        return Contents.of(rank, set(range(len(self.sources))), len(self.sources))

    def needs_slow_path(self, module: str) -> bool:
        """Is this adapter module one that only vLLM's loader can bring into the slot?"""
        parts = module.split(".")
        slow = self._slow
        return any(".".join(parts[:end]) in slow for end in range(1, len(parts) + 1))

    @property
    def _slow(self) -> frozenset[str]:
        cached: frozenset[str] = self.__dict__.setdefault("slow_set", frozenset(self.slow))
        return cached


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
