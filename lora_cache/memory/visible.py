"""Which GPUs CUDA shows a process: ``CUDA_VISIBLE_DEVICES``, read as the CUDA driver reads it.

NVML knows nothing of that variable: it lists every GPU, in the order of the PCI bus.  So "my first
GPU" has to be translated.  Rules: CUDA Programming Guide, "CUDA Environment Variables"; NVIDIA MIG
User Guide, "CUDA Device Enumeration"; what neither says (repeated entries, ``1gpu``) as PyTorch
has it (``torch.cuda._parse_visible_devices``), which a test compares with this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

_NUMBER = re.compile(r"[+-]?[0-9]*")
_OLD_MIG = re.compile(r"MIG-(GPU-[0-9a-fA-F-]+)/([0-9]+)/([0-9]+)")


@dataclass(frozen=True, slots=True)
class MigPart:
    """A MIG device: one compute instance of a GPU.

    Attributes:
        index: the one that NVML's ``nvmlDeviceGetMigDeviceHandleByIndex`` takes.
        gpu_instance, compute_instance: their ids, or None where NVML does not say.
    """

    index: int
    uuid: str
    gpu_instance: int | None = None
    compute_instance: int | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, as NVML lists it.

    Attributes:
        index: NVML's.
        uuid, name: "" where NVML does not say, because the GPU is lost.
        mig: its MIG devices; None while MIG is off.
    """

    index: int
    uuid: str
    name: str
    mig: tuple[MigPart, ...] | None = None


#: What CUDA shows as one device: a whole GPU (None), or a MIG device of it.
Place = tuple[Gpu, MigPart | None]


@dataclass(frozen=True, slots=True)
class Visible:
    """What CUDA shows, in its order.

    Attributes:
        places: ``places[0]`` is ``cuda:0``.
        note: what a user should know of it (an entry that names nothing, an order that only CUDA
            knows), or None.
    """

    places: tuple[Place, ...]
    note: str | None = None


def visible_devices(gpus: Sequence[Gpu], value: str | None, order: str | None = None) -> Visible:
    """Translate.

    Args:
        gpus: all there are, in NVML's order.
        value: of ``CUDA_VISIBLE_DEVICES``; None if it is not set.
        order: of ``CUDA_DEVICE_ORDER``; None if it is not set.
    """
    named = _uuids(gpus, value) if value and value.startswith(("GPU-", "MIG-")) else None
    chosen, note = named or _numbers(gpus, value)
    if named is None and order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus if gpu.name}) > 1:
        # The driver puts what it takes for the fastest GPU first, and does not say how.
        note = note or (
            "these GPUs are of several kinds and CUDA orders them by speed: which one is cuda:0 "
            "is a guess unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set"
        )
    return Visible(_enumerated(chosen), note)


_Chosen = tuple[list[Place], str | None]


def _numbers(gpus: Sequence[Gpu], value: str | None) -> _Chosen:
    if value is None:
        return [(gpu, None) for gpu in gpus], None
    numbers: list[int] = []
    for entry in value.split(",") if value.strip() else ():
        number = _leading_number(entry.strip())
        if number in numbers:
            return [], _twice(value)
        numbers.append(number)
        if number < 0:
            break
    chosen: list[Place] = []
    for number, entry in zip(numbers, value.split(","), strict=False):
        if not 0 <= number < len(gpus):
            return chosen, _nothing(value, entry)
        chosen.append((gpus[number], None))
    return chosen, None


def _uuids(gpus: Sequence[Gpu], value: str) -> _Chosen:
    kind = value[:4]  # what comes after an entry of the other kind is not read
    entries = value.split(",")
    entries = list(takewhile(lambda entry: entry.startswith(kind), entries))
    if len(set(entries)) < len(entries):
        return [], _twice(value)
    known: list[tuple[str, Place]] = [(gpu.uuid, (gpu, None)) for gpu in gpus]
    known += [(part.uuid, (gpu, part)) for gpu in gpus for part in gpu.mig or ()]
    chosen: list[Place] = []
    for entry in entries:
        found = _old_mig(gpus, entry) or [place for uuid, place in known if uuid.startswith(entry)]
        if len(found) != 1:
            return chosen, _nothing(value, entry)
        if found[0] in chosen:
            return [], _twice(value)
        chosen += found
    rest = value.split(",")[len(entries) :]
    return chosen, _nothing(value, rest[0]) if rest else None


def _old_mig(gpus: Sequence[Gpu], entry: str) -> list[Place]:
    """``MIG-GPU-…/1/0``: by instances, as drivers before R470 named them."""
    if (match := _OLD_MIG.fullmatch(entry)) is None:
        return []
    uuid, instances = match[1], (int(match[2]), int(match[3]))
    return [
        (gpu, part)
        for gpu in gpus
        if gpu.uuid.startswith(uuid)
        for part in gpu.mig or ()
        if (part.gpu_instance, part.compute_instance) == instances
    ]


def _enumerated(chosen: list[Place]) -> tuple[Place, ...]:
    """Of what was chosen, what CUDA enumerates: one MIG device alone, or whole GPUs."""
    whole: list[Place] = []
    for gpu, part in chosen:
        if part is not None:
            return ((gpu, part),)
        if gpu.mig:
            return ((gpu, gpu.mig[0]),)
        if gpu.mig is None:
            whole.append((gpu, None))
        # else: MIG is on and nothing was made of it, so there is nothing to run on
    return tuple(whole)


def _leading_number(text: str) -> int:
    """C's strtol, but −1 where there is no number."""
    match = _NUMBER.match(text)
    digits = match[0] if match else ""
    return int(digits) if digits.strip("+-") else -1


def _twice(value: str) -> str:
    return f"CUDA_VISIBLE_DEVICES={value} names one device twice: CUDA shows none"


def _nothing(value: str, entry: str) -> str:
    return (
        f"CUDA_VISIBLE_DEVICES={value}: {entry.strip()!r} names no device here, so CUDA shows "
        "only those before it"
    )
