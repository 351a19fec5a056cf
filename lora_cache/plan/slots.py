"""What a LoRA slot costs on each GPU, layer by layer, as vLLM allocates it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_cache.errors import ConfigError
from lora_cache.plan.layers import Layer, Split, check_split
from lora_cache.plan.model import ITEM_BYTES, Model

#: What vLLM takes for ``max_lora_rank`` (``vllm/config/lora.py``, 0.26 to 0.33).
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LARGEST_VOCAB = 258_048  # of a head with LoRA (``LogitsProcessorWithLoRA``)


@dataclass(frozen=True, slots=True)
class SlotSettings:
    """The settings of vLLM that decide how large a slot is.

    Attributes:
        max_lora_rank: as for vLLM.
        tp: GPUs that share the model.
        lora_dtype: of slots; ``auto`` is the model's.
        fully_sharded: vLLM's ``fully_sharded_loras``.
        target_modules: vLLM's ``lora_target_modules``: only these layers have slots; None for all
            that vLLM supports.
    """

    max_lora_rank: int
    tp: int = 1
    lora_dtype: str = "auto"
    fully_sharded: bool = False
    target_modules: tuple[str, ...] | None = None

    def dtype(self, model: Model) -> str:
        """The dtype of slots."""
        found = model.dtype if self.lora_dtype == "auto" else self.lora_dtype
        if found not in ITEM_BYTES:
            raise ConfigError(f"lora_dtype {found!r}: there are auto, {', '.join(ITEM_BYTES)}")
        return found


@dataclass(frozen=True, slots=True)
class SlotCost:
    """What slots cost on each GPU.

    Attributes:
        parts: bytes in one slot, by layer.
        item_bytes: of a number in it.
        bytes_per_slot: all of it.
        fixed_bytes: beside the slots, however many there are.
    """

    parts: tuple[tuple[Layer, int], ...]
    item_bytes: int
    bytes_per_slot: int
    fixed_bytes: int

    def nbytes(self, max_loras: int) -> int:
        """Bytes of so many slots, and what is beside them."""
        return max_loras * self.bytes_per_slot + self.fixed_bytes

    def of(self, names: Iterable[str]) -> int:
        """Bytes in one slot of the layers with these names."""
        wanted = set(names)
        return sum(nbytes for layer, nbytes in self.parts if layer.name in wanted)


def slot_cost(
    model: Model, settings: SlotSettings, *, batched_tokens: int = 0, seqs: int = 0
) -> SlotCost:
    """Reckon it.

    Beside the slots vLLM keeps, on each GPU, a flag for each layer of experts, a table that
    reorders the vocabulary if the head has LoRA and is split, and indices for each token and
    sequence of a batch (``PunicaWrapperBase``: four int64 a token, three a sequence; on GPUs twice
    two int32 a token more, in ``LoRAKernelMeta``, and 24 bytes a slot, which are left out here).

    Args:
        batched_tokens: vLLM's ``max_num_batched_tokens``.
        seqs: vLLM's ``max_num_seqs``.

    Raises:
        ConfigError: vLLM would refuse these settings for this model.
    """
    rank, tp, sharded = settings.max_lora_rank, settings.tp, settings.fully_sharded
    if rank not in MAX_LORA_RANKS:
        raise ConfigError(f"max_lora_rank {rank}: vLLM takes {', '.join(map(str, MAX_LORA_RANKS))}")
    check_split(model.layers, tp, rank, sharded=sharded)
    item = ITEM_BYTES[settings.dtype(model)]
    layers = [layer for layer in model.layers if _has_slots(layer, settings.target_modules)]
    parts = [(layer, layer.slot_bytes(rank, tp, item, sharded=sharded)) for layer in layers]
    fixed = sum(layer.number * layer.flag_bytes for layer in layers)
    fixed += batched_tokens * (4 * 8 + 2 * 2 * 4) + seqs * 3 * 8
    for layer in layers:
        if layer.split is Split.LOGITS:
            vocab = layer.slices[0][0].size
            if vocab > _LARGEST_VOCAB:
                raise ConfigError(
                    f"the vocabulary has {vocab} entries, and vLLM's LoRA for the head takes at "
                    f"most {_LARGEST_VOCAB}: leave lm_head out of the target modules"
                )
            fixed += layer.padded_vocab * 8 if tp > 1 else 0
    return SlotCost(tuple(parts), item, sum(nbytes for _, nbytes in parts), fixed)


def packed_copies(model: Model, settings: SlotSettings, targets: Iterable[str]) -> float:
    """How often an adapter's bytes are there in its packed images, over all GPUs.

    Once on one GPU.  On more of them less often than there are GPUs: each has of one of a layer's
    two matrices only its share (of both, if LoRAs are fully sharded).  Experts are not packed:
    then each has the whole.

    Args:
        targets: names of its modules; none known: all linear layers.
    """
    names = set(targets)
    layers = [layer for layer in model.layers if _has_slots(layer, settings.target_modules)]
    linear = [layer for layer in layers if layer.split not in (Split.EMBEDDING, Split.LOGITS)]
    targeted = [layer for layer in layers if names.intersection(_all(layer))] or linear
    if any("experts" in _all(layer) for layer in targeted):
        return float(settings.tp)

    def nbytes(tp: int) -> int:
        rank, sharded = settings.max_lora_rank, settings.fully_sharded
        return tp * sum(at.slot_bytes(rank, tp, 1, sharded=sharded) for at in targeted)

    return nbytes(settings.tp) / max(1, nbytes(1))


def smallest_rank(rank: int) -> int:
    """The least ``max_lora_rank`` that admits adapters of `rank`.

    Raises:
        ConfigError: there is none.
    """
    for allowed in MAX_LORA_RANKS:
        if allowed >= rank:
            return allowed
    raise ConfigError(f"vLLM serves ranks up to {MAX_LORA_RANKS[-1]}, not {rank}")


def check_target_modules(model: Model, targets: tuple[str, ...]) -> None:
    """Raise `ConfigError` if one of them is nothing that vLLM has slots for."""
    for target in targets:
        if not any(_names(layer, target) for layer in model.layers if layer.has_lora):
            known = sorted({n for layer in model.layers if layer.has_lora for n in _all(layer)})
            raise ConfigError(
                f"target module {target!r}: vLLM has slots for {', '.join(known)} in this model"
            )


def served_names(model: Model, targets: tuple[str, ...] | None) -> set[str]:
    """Names of modules, as adapters have them, that vLLM serves: all parts of a layer, or none."""
    layers = [layer for layer in model.layers if _has_slots(layer, targets)]
    return {name for layer in layers for name in ("experts", layer.name, *layer.members)}


def _has_slots(layer: Layer, targets: tuple[str, ...] | None) -> bool:
    if not layer.has_lora:
        return False
    return targets is None or any(_names(layer, target) for target in targets)


def _names(layer: Layer, target: str) -> bool:
    return target in _all(layer)


def _all(layer: Layer) -> tuple[str, ...]:
    """What `target_modules` may call it: vLLM asks for all experts, or none."""
    if layer.name.startswith("experts."):
        return ("experts",)
    return (layer.name, *layer.members)
