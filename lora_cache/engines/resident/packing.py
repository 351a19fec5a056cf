"""Packs an adapter's files into the image that a slot is written from.

Runs beside the worker, in a process of its own: it needs torch (for its casts and products, whose
roundings are vLLM's own), and never vLLM.  What it does not know for certain it refuses with
`CannotPackError`, and vLLM's loader has its say.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_cache.engines.resident.layout import Contents, Layout, Piece, Placed
from lora_cache.engines.resident.names import ParsedName, is_skipped, parse_name
from lora_cache.engines.resident.peft_config import PeftConfig, read_peft_config
from lora_cache.errors import CannotPackError, InvalidAdapterError
from lora_cache.manifest import WEIGHTS_FILE


class _Module:
    """One adapter module: the names and shapes of its two matrices, and its scaling."""

    def __init__(self, peft_module: str) -> None:
        self.peft_module = peft_module
        self.names: dict[str, str] = {}
        self.shapes: dict[str, list[int]] = {}

    @property
    def rank(self) -> int:
        return self.shapes["A"][0]


def examine(layout: Layout, directory: Path) -> Contents:
    """What the image of an adapter will hold: reads its configuration and header, no weights.

    Use `Layout.nbytes` on the answer to know how large a buffer `pack` needs.

    Raises:
        CannotPackError: the packer does not know this adapter, or this model.
        InvalidAdapterError: a file cannot be read.
    """
    with _open(directory) as file:
        return _contents(layout, _modules(layout, file, read_peft_config(directory), directory))


def pack(layout: Layout, directory: Path, out: Any) -> Contents:
    """Write the image of an adapter.

    Every byte of the image is written, the gaps between pieces as zeros: equal adapters give equal
    images.  What lies behind it in `out` is left alone.  After an error `out` holds anything.

    Args:
        layout: of the worker that the image is for.
        directory: an adapter that `read_manifest` accepts.
        out: a writable, contiguous buffer of bytes: shared memory, a memoryview, a numpy array.

    Returns:
        What the image holds; its size is `Layout.nbytes` of that.

    Raises:
        CannotPackError: the packer does not know this adapter, or this model.
        InvalidAdapterError: a file cannot be read.
        ValueError: `out` is too small.
    """
    config = read_peft_config(directory)
    with _open(directory) as file:
        modules = _modules(layout, file, config, directory)
        contents = _contents(layout, modules)
        nbytes = layout.nbytes(contents)
        view = memoryview(out).cast("B")
        if len(view) < nbytes:
            raise ValueError(f"the image has {nbytes} bytes, the buffer {len(view)}")
        image = torch.frombuffer(view, dtype=torch.uint8, count=nbytes)
        end = 0
        for placed in layout.place(contents):
            piece = layout.pieces[placed.number]
            target = _target(layout, image, placed)
            module = modules[piece.source]
            image[end : placed.offset].zero_()
            end = placed.offset + target.numel() * layout.item_bytes
            try:
                weights = file.get_tensor(module.names[piece.matrix])
            except SafetensorError as error:
                raise InvalidAdapterError(f"{directory / WEIGHTS_FILE}: {error}") from error
            _fill(target, piece, weights, module.rank, config.scaling(module.peft_module))
        image[end:].zero_()
    return contents


def _target(layout: Layout, image: torch.Tensor, placed: Placed) -> torch.Tensor:
    rows, columns = placed.shape
    stop = placed.offset + rows * columns * layout.item_bytes
    return image[placed.offset : stop].view(getattr(torch, layout.dtype)).view(rows, columns)


def _fill(
    target: torch.Tensor, piece: Piece, weights: torch.Tensor, rank: int, scaling: float
) -> None:
    """Cast, cut and scale in vLLM's order: cast to the slot's dtype first, then multiply there."""
    across = weights if piece.matrix == "A" else weights.T  # (rank, width)
    ranks = piece.ranks(rank)
    across = across[piece.rank_start : piece.rank_start + ranks]
    oriented = target if piece.rank_first else target.T  # (ranks of the image, length)
    column = 0
    for start, stop in piece.spans:
        oriented[:ranks, column : column + stop - start].copy_(across[:, start:stop])
        column += stop - start
    if piece.matrix == "B" and scaling != 1:
        oriented[:ranks].mul_(scaling)
    oriented[ranks:].zero_()  # the image's rank is that of the adapter's largest module


def _open(directory: Path) -> Any:
    try:
        return safe_open(os.fspath(directory / WEIGHTS_FILE), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidAdapterError(f"{directory / WEIGHTS_FILE} cannot be read: {error}") from error


def _contents(layout: Layout, modules: dict[int, _Module]) -> Contents:
    rank = max((module.rank for module in modules.values()), default=1)
    return Contents.of(rank, set(modules), len(layout.sources))


def _modules(layout: Layout, file: Any, config: PeftConfig, directory: Path) -> dict[int, _Module]:
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
    for name in file.keys():  # noqa: SIM118 - no mapping
        if is_skipped(name, layout.skip_prefixes):
            continue
        parsed = parse_name(name, layout.renames)
        seen = True
        index = indices.get(parsed.module)
        if index is None:
            _check_ignored(layout, parsed, name)
            continue
        module = modules.setdefault(index, _Module(parsed.peft_module))
        if parsed.matrix in module.names:
            raise CannotPackError(f"{name} is there twice")
        module.names[parsed.matrix] = name
        module.shapes[parsed.matrix] = list(file.get_slice(name).get_shape())
        if parsed.is_embedding and parsed.matrix == "A":
            _check_vocabulary(layout, module, name)
    if not seen:
        raise CannotPackError(f"{directory / WEIGHTS_FILE} holds no LoRA weights")
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


def _check_vocabulary(layout: Layout, module: _Module, name: str) -> None:
    if module.shapes["A"][1:] != [layout.vocab_size]:
        raise CannotPackError(f"{name}: the model's vocabulary has {layout.vocab_size} tokens")


def _check_halves(layout: Layout, source: str, module: _Module) -> None:
    shapes = module.shapes
    if set(shapes) != {"A", "B"}:
        raise CannotPackError(f"{source} has but one of its two matrices")
    if len(shapes["A"]) != 2 or len(shapes["B"]) != 2 or shapes["A"][0] != shapes["B"][1]:
        raise CannotPackError(f"{source}: shapes {shapes['A']} and {shapes['B']} do not match")
    if not 0 < module.rank <= layout.max_rank:
        raise CannotPackError(f"{source}: a rank of {module.rank} does not fit")


def _check_width(piece: Piece, source: str, module: _Module) -> None:
    width = module.shapes[piece.matrix][1 if piece.matrix == "A" else 0]
    needed = piece.width if piece.width_is_exact else max(stop for _, stop in piece.spans)
    if width < needed or (piece.width_is_exact and width > needed):
        raise CannotPackError(f"{source}: {piece.matrix} is {width} wide, the model has {needed}")
