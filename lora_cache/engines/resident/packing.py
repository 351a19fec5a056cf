"""Packs an adapter's files into the image that a slot is written from.

Runs beside the worker, in a process of its own: it needs torch (for its casts and products, whose
roundings are vLLM's own), and never vLLM.  What it does not know for certain it refuses with
`CannotPackError`, and vLLM's loader has its say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_cache.engines.resident.hands import ALONE, Hands
from lora_cache.engines.resident.layout import Contents, Layout, Piece, Placed
from lora_cache.engines.resident.names import ParsedName, is_skipped, parse_name
from lora_cache.engines.resident.peft_config import PeftConfig, read_peft_config
from lora_cache.engines.resident.weights_file import Tensor, WeightsFile
from lora_cache.errors import CannotPackError
from lora_cache.manifest import WEIGHTS_FILE, read_stamp

_SHARE_BYTES = 4 << 20  # of an image, that one thread packs at a time


class _Module:
    """One adapter module: its two matrices, and its scaling."""

    def __init__(self, scaling: float) -> None:
        self.scaling = scaling
        self.matrices: dict[str, Tensor] = {}

    @property
    def rank(self) -> int:
        return self.matrices["A"].shape[0]


class Source:
    """An adapter's files, open: what is examined is what will be packed.

    Close it when all images are made.

    Attributes:
        stamp: of the files, before they were opened.

    Raises:
        CannotPackError: the packer does not know this adapter.
        InvalidAdapterError: a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.stamp = read_stamp(directory)
        self.config = read_peft_config(directory)
        self.weights = WeightsFile(directory / WEIGHTS_FILE)

    def close(self) -> None:
        self.weights.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Packing:
    """One image to be made of an adapter.

    Attributes:
        contents: what the image will hold.
        nbytes: its size.

    Raises:
        CannotPackError: the packer does not know this adapter, or this model.
    """

    def __init__(self, layout: Layout, source: Source) -> None:
        self._layout = layout
        self._dtype = getattr(torch, layout.dtype)
        self._weights = source.weights
        self._modules = _modules(layout, source.weights, source.config)
        self.contents = _contents(layout, self._modules)
        self.nbytes = layout.nbytes(self.contents)

    def fill(self, out: Any, hands: Hands = ALONE) -> None:
        """Write the image.

        Every byte of it is written, the gaps between pieces as zeros: equal adapters give equal
        images.  What lies behind it in `out` is left alone.  After an error `out` holds anything.

        Args:
            out: a writable, contiguous buffer of bytes: shared memory, a memoryview, an array.
            hands: who does it; nobody writes to `out` any more when this returns or raises.

        Raises:
            InvalidAdapterError: a file cannot be read.
            ValueError: `out` is too small.
        """
        view = memoryview(out).cast("B")
        if len(view) < self.nbytes:
            raise ValueError(f"the image has {self.nbytes} bytes, the buffer {len(view)}")
        image = view[: self.nbytes]
        placed = self._layout.place(self.contents)
        self._clear_gaps(image, placed)
        as_read = sorted(placed, key=self._start)  # neighbours in the file come in one go
        hands.do(lambda share: self._pack(image, share), list(self._shares(as_read)))

    def _tensor(self, placed: Placed) -> Tensor:
        piece = self._layout.pieces[placed.number]
        return self._modules[piece.source].matrices[piece.matrix]

    def _start(self, placed: Placed) -> int:
        return self._tensor(placed).start

    def _shares(self, placed: Sequence[Placed]) -> Iterator[list[Placed]]:
        """What one thread should pack at a time."""
        share: list[Placed] = []
        nbytes = 0
        for where in placed:
            share.append(where)
            nbytes += self._size(where)
            if nbytes >= _SHARE_BYTES:
                yield share
                share, nbytes = [], 0
        if share:
            yield share

    def _clear_gaps(self, image: memoryview, placed: Sequence[Placed]) -> None:
        end = 0
        for where in placed:
            if end < where.offset:
                image[end : where.offset] = bytes(where.offset - end)
            end = where.offset + self._size(where)
        image[end:] = bytes(len(image) - end)

    def _pack(self, image: memoryview, share: Sequence[Placed]) -> None:
        reads: list[tuple[int, memoryview]] = []
        scaled: list[tuple[torch.Tensor, float]] = []
        for placed in share:
            piece = self._layout.pieces[placed.number]
            module = self._modules[piece.source]
            tensor = module.matrices[piece.matrix]
            is_scaled = piece.matrix == "B" and module.scaling != 1
            runs = None
            if tensor.dtype == self._layout.dtype:
                runs = _runs(piece, tensor, module.rank, placed.shape)
            if runs is None:
                target = self._target(image, placed).view(placed.shape)
                target = _fill(target, piece, self._mapped(tensor), module.rank)
            else:
                at = placed.offset
                for start, stop in runs:
                    reads.append((start, image[at : at + stop - start]))
                    at += stop - start
                # Every object costs as much as reading some kilobytes: none that is not needed.
                target = self._target(image, placed) if is_scaled else None
            if is_scaled:
                scaled.append((target, module.scaling))
        self._weights.read(reads)
        for target, scaling in scaled:
            # After the cast, in the slot's dtype, as vLLM does it (and not by `_foreach_mul_`,
            # which rounds the scaling itself first).
            target.mul_(scaling)

    def _size(self, placed: Placed) -> int:
        return placed.shape[0] * placed.shape[1] * self._layout.item_bytes

    def _target(self, image: memoryview, placed: Placed) -> torch.Tensor:
        """The piece's numbers in the image, flat."""
        count = placed.shape[0] * placed.shape[1]
        return torch.frombuffer(image, dtype=self._dtype, count=count, offset=placed.offset)

    def _mapped(self, tensor: Tensor) -> torch.Tensor:
        dtype = getattr(torch, tensor.dtype)
        count = tensor.nbytes // dtype.itemsize
        mapped = self._weights.mapped()
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=tensor.start).view(
            tensor.shape
        )


def examine(layout: Layout, directory: Path) -> Contents:
    """What the image of an adapter will hold: reads its configuration and header, no weights.

    Raises:
        CannotPackError: the packer does not know this adapter, or this model.
        InvalidAdapterError: a file cannot be read.
    """
    with Source(directory) as source:
        return Packing(layout, source).contents


def pack(layout: Layout, directory: Path, out: Any) -> Contents:
    """Write the image of an adapter, in this thread; see `Packing.fill`.

    Raises:
        as `examine`, and `Packing.fill`.
    """
    with Source(directory) as source:
        packing = Packing(layout, source)
        packing.fill(out)
        return packing.contents


def _runs(
    piece: Piece, tensor: Tensor, rank: int, shape: tuple[int, int]
) -> list[tuple[int, int]] | None:
    """Where the file has the bytes of a piece as they are, in their order; None: nowhere.

    So it is when slot and file have whole rows in common: nothing to transpose, cut or pad.
    """
    row = tensor.nbytes // tensor.shape[0]
    if piece.matrix == "A":
        first, count = piece.rank_start, piece.ranks(rank)
        whole_rows = piece.rank_first and piece.spans == ((0, tensor.shape[1]),)
        if not whole_rows or shape[0] != count:
            return None
        spans: Sequence[tuple[int, int]] = ((first, first + count),)
    else:
        if piece.rank_first or piece.rank_start or shape[1] != rank:
            return None
        spans = piece.spans
    return [(tensor.start + start * row, tensor.start + stop * row) for start, stop in spans]


def _fill(target: torch.Tensor, piece: Piece, weights: torch.Tensor, rank: int) -> torch.Tensor:
    """Cast, transpose and cut; the image's rank is that of the adapter's largest module.

    Returns:
        `target` without the padding, whose zeros stay positive when the rest is scaled.
    """
    across = weights if piece.matrix == "A" else weights.T  # (rank, width)
    oriented = target if piece.rank_first else target.T  # (ranks of the image, length)
    ranks = piece.ranks(rank)
    # A view costs as much as copying some kilobytes: none where all of it is meant.
    if ranks != len(across):
        across = across[piece.rank_start : piece.rank_start + ranks]
    if ranks != len(oriented):
        oriented[ranks:].zero_()
        oriented = oriented[:ranks]
    if piece.spans == ((0, across.shape[1]),):
        oriented.copy_(across)
        return oriented
    column = 0
    for start, stop in piece.spans:
        oriented[:, column : column + stop - start].copy_(across[:, start:stop])
        column += stop - start
    return oriented


def _contents(layout: Layout, modules: dict[int, _Module]) -> Contents:
    rank = max((module.rank for module in modules.values()), default=1)
    return Contents.of(rank, set(modules), len(layout.sources))


def _modules(layout: Layout, weights: WeightsFile, config: PeftConfig) -> dict[int, _Module]:
    """The adapter's modules that have a place in the slot, by their index in `Layout.sources`."""
    if layout.refusal:
        raise CannotPackError(f"the packer cannot fill this model's slots: {layout.refusal}")
    if config.has_patterns and not layout.honours_patterns:
        raise CannotPackError(f"vLLM {layout.vllm_version} ignores rank and alpha patterns")
    if config.largest_rank > layout.max_rank:
        raise CannotPackError(f"rank {config.largest_rank} is above max_lora_rank")
    indices = {source: index for index, source in enumerate(layout.sources)}
    modules: dict[int, _Module] = {}
    seen = False
    for name, tensor in weights.tensors.items():
        if is_skipped(name, layout.skip_prefixes):
            continue
        parsed = parse_name(name, layout.renames)
        seen = True
        index = indices.get(parsed.module)
        if index is None:
            _check_ignored(layout, parsed, name)
            continue
        if index not in modules:
            modules[index] = _Module(config.scaling(parsed.peft_module))
        matrices = modules[index].matrices
        if parsed.matrix in matrices:
            raise CannotPackError(f"{name} is there twice")
        matrices[parsed.matrix] = tensor
        if parsed.is_embedding and parsed.matrix == "A":
            _check_vocabulary(layout, tensor, name)
    if not seen:
        raise CannotPackError(f"{weights.path} holds no LoRA weights")
    for index, module in modules.items():
        _check_halves(layout, layout.sources[index], module)
    for piece in layout.pieces:
        if piece.source in modules:
            _check_width(piece, layout.sources[piece.source], modules[piece.source])
    return modules


def _check_ignored(layout: Layout, parsed: ParsedName, name: str) -> None:
    """A module that this model, or this worker, has not: vLLM ignores it if its kind is known."""
    if layout.needs_slow_path(parsed.module) or ".experts" in parsed.module:
        raise CannotPackError(f"{name} goes into a layer that only vLLM's loader fills")
    if parsed.module.rpartition(".")[2] not in layout.expected:
        raise CannotPackError(f"{name} is of no module that the model has")


def _check_vocabulary(layout: Layout, tensor: Tensor, name: str) -> None:
    if tensor.shape[1:] != (layout.vocab_size,):
        raise CannotPackError(f"{name}: the model's vocabulary has {layout.vocab_size} tokens")


def _check_halves(layout: Layout, source: str, module: _Module) -> None:
    shapes = {matrix: tensor.shape for matrix, tensor in module.matrices.items()}
    if set(shapes) != {"A", "B"}:
        raise CannotPackError(f"{source} has but one of its two matrices")
    if len(shapes["A"]) != 2 or len(shapes["B"]) != 2 or shapes["A"][0] != shapes["B"][1]:
        raise CannotPackError(f"{source}: shapes {shapes['A']} and {shapes['B']} do not match")
    if not 0 < module.rank <= layout.max_rank:
        raise CannotPackError(f"{source}: a rank of {module.rank} does not fit")


def _check_width(piece: Piece, source: str, module: _Module) -> None:
    width = module.matrices[piece.matrix].shape[1 if piece.matrix == "A" else 0]
    needed = piece.width if piece.width_is_exact else max(stop for _, stop in piece.spans)
    if width < needed or (piece.width_is_exact and width > needed):
        raise CannotPackError(f"{source}: {piece.matrix} is {width} wide, the model has {needed}")
