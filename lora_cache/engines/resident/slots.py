"""Writes an image into a slot, whole: nothing of the slot's former adapter is left.

On a GPU one kernel does it (`scatter`), on a CPU one copy for every tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lora_cache.engines.resident.layout import Contents, Layout, Placed

_KEPT_PLANS = 64


class _Copies(NamedTuple):
    """The views that writes of one (slot, contents) fill; made once, as making them takes time."""

    nbytes: int
    empty: list[torch.Tensor]
    targets: list[torch.Tensor]
    placed: list[Placed]


class _Table(NamedTuple):
    """What `Scatter.write` needs for images of one kind."""

    nbytes: int
    table: torch.Tensor


class SlotWriter:
    """Fills the slots of one worker.

    Thread-safe.  A write touches its own slot only: the step loop may read the others meanwhile.
    That no batch reads *this* slot, and that a batch that will is ordered behind the write, is the
    caller's business.  On CUDA everything is queued on the current stream, and nothing waits.
    """

    def __init__(self, adapter_manager: Any, layout: Layout) -> None:
        """Look up the slot tensors that `layout` names.

        Args:
            adapter_manager: the vLLM ``LoRAModelManager`` that `layout` describes.
            layout: as `describe` gave it.

        Raises:
            ValueError: the two do not belong together.
        """
        self._layout = layout
        self._slots = int(adapter_manager.lora_slots)
        modules = adapter_manager.modules
        self._tensors: list[torch.Tensor] = []
        for piece in layout.pieces:
            layer = modules[piece.module]
            stacked = layer.lora_a_stacked if piece.matrix == "A" else layer.lora_b_stacked
            tensor = stacked if piece.index is None else stacked[piece.index]
            rows, columns = piece.shape(layout.max_rank)
            if tensor.shape[-2] < rows or tensor.shape[-1] < columns:
                raise ValueError(f"{piece.module} has no room for {rows} × {columns} numbers")
            self._tensors.append(tensor)
        self._resets: list[Callable[[int], object]] = []
        for name in layout.resets:
            self._resets.append(modules[name].reset_lora)
            if reset := getattr(modules[name], "reset_module_to_save", None):
                self._resets.append(reset)
        self._plans: OrderedDict[Any, _Copies | _Table] = OrderedDict()
        self._lock = threading.Lock()
        self._scatter: Any = None
        if self._tensors and self._tensors[0].is_cuda:
            from lora_cache.engines.resident.scatter import Scatter  # needs Triton

            self._scatter = Scatter(self._tensors)

    def write(self, slot: int, image: torch.Tensor, contents: Contents) -> None:
        """Fill a slot from an image.

        Args:
            slot: its index.
            image: contiguous ``uint8`` of at least ``layout.nbytes(contents)`` bytes, on the
                slot's device, aligned to its dtype.  It must stay unchanged until the copies are
                done: on CUDA until the current stream has come here.
            contents: what `pack` returned.

        Raises:
            ValueError: no such slot, or the image is too small or of another kind.
        """
        if not 0 <= slot < self._slots:
            raise ValueError(f"slot {slot} of {self._slots}")
        if image.dtype != torch.uint8 or image.dim() != 1 or not image.is_contiguous():
            raise ValueError("an image is a flat, contiguous uint8 tensor")
        if contents.rank > self._layout.max_rank:
            raise ValueError(f"an image of rank {contents.rank} does not fit a slot")
        # vLLM's slot tensors may be inference tensors, which only inference mode may write.
        with torch.inference_mode():
            plan = self._plan(slot, contents)
            if image.numel() < plan.nbytes:
                raise ValueError(f"an image of {image.numel()} bytes, it should have {plan.nbytes}")
            for reset in self._resets:
                reset(slot)
            if isinstance(plan, _Copies):
                self._copy(plan, image)
            else:
                self._scatter.write(slot, image[: plan.nbytes], plan.table)

    def _copy(self, plan: _Copies, image: torch.Tensor) -> None:
        item_bytes = self._layout.item_bytes
        numbers = image[: plan.nbytes].view(getattr(torch, self._layout.dtype))
        first = numbers.storage_offset()
        sources = [
            numbers.as_strided(p.shape, (p.shape[1], 1), first + p.offset // item_bytes)
            for p in plan.placed
        ]
        if plan.empty:
            torch._foreach_zero_(plan.empty)
        if sources:
            torch._foreach_copy_(plan.targets, sources)

    def clear(self, slot: int) -> None:
        """Fill a slot with zeros: an adapter that changes nothing."""
        nothing = Contents.of(1, set(), len(self._layout.sources))
        device = self._tensors[0].device if self._tensors else None
        self.write(slot, torch.empty(0, dtype=torch.uint8, device=device), nothing)

    def _plan(self, slot: int, contents: Contents) -> _Copies | _Table:
        key = contents if self._scatter else (slot, contents)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._table(contents) if self._scatter else self._copies(slot, contents)
                self._plans[key] = plan
                if len(self._plans) > _KEPT_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def _table(self, contents: Contents) -> _Table:
        from lora_cache.engines.resident.scatter import Place

        places = [
            Place(p.number, *p.shape, p.offset // self._layout.item_bytes)
            for p in self._layout.place(contents)
        ]
        return _Table(self._layout.nbytes(contents), self._scatter.table(places))

    def _copies(self, slot: int, contents: Contents) -> _Copies:
        empty = dict(enumerate(self._tensors))
        targets, placed = [], []
        for where in self._layout.place(contents):
            whole = self._tensors[where.number][slot]
            whole = whole.view(whole.shape[-2:])
            rows, columns = where.shape
            targets.append(whole[:rows, :columns])
            placed.append(where)
            if whole.shape == where.shape:
                del empty[where.number]  # overwritten to the last number
        # A tensor that is filled in part is emptied whole: that is one contiguous stretch, which
        # is faster than the two or more that would be left over.
        nbytes = self._layout.nbytes(contents)
        return _Copies(nbytes, [tensor[slot] for tensor in empty.values()], targets, placed)
