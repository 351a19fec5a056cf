"""GPU memory through NVML: totals, what is free, and who has it.

NVML fails in many ways, and none of them is a reason to stop serving: no library, no driver, a GPU
that fell off the bus, a container that may not see processes.  Each of these is "unknown", with a
reason, said once in the log; and when it works again, that is said too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_cache.memory.visible import Gpu, MigPart, Place, Visible, visible_devices

logger = logging.getLogger(__name__)

#: pynvml's constants (nvml.h): codes that are handled, and the second version of memory info.
_UNINITIALIZED, _NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND = 1, 3, 4, 13
_MEMORY_V2 = 0x02000028

#: What each code means for a user; other codes are told in NVML's own words.
_WORDS = {
    _NOT_SUPPORTED: "this GPU or driver does not support it",
    _NO_PERMISSION: "no permission: inside a container, run it with --pid=host or as root",
    9: "the NVIDIA driver is not loaded",
    12: "there is no NVIDIA driver on this machine (libnvidia-ml.so.1)",
    15: "the GPU is lost: it fell off the bus, or is being reset",
    16: "the GPU must be reset before it works again",
    18: "the driver was updated under running programs: reload it, or restart the machine",
}
_NO_PYNVML = "NVML needs nvidia-ml-py: pip install 'lora-cache[gpu]'"


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that has memory on a GPU.

    Attributes:
        pid: as the machine counts; inside a container another number than the process's own.
        used: bytes, or None where the driver does not say.
    """

    pid: int
    used: int | None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One of the devices that CUDA shows, in bytes; None is unknown, and `unknown` says why.

    Attributes:
        ordinal: CUDA's number, as in ``cuda:0``.
        index: NVML's number of the GPU.
        uuid: of the GPU, or of the MIG device.
        total: of the whole device.  What CUDA calls total is less by `reserved`.
        used: by programs; with drivers that do not tell them apart, `reserved` is part of it.
        reserved: by the driver, or None.
        processes: who has it; None if unknown, or not asked for.
        unknown: why something above is None, or None.
    """

    ordinal: int
    index: int
    uuid: str
    name: str
    is_mig: bool
    total: int | None = None
    used: int | None = None
    free: int | None = None
    reserved: int | None = None
    processes: tuple[GpuProcess, ...] | None = None
    unknown: str | None = None

    @property
    def share(self) -> float | None:
        """How much of it is in use or reserved, 0 to 1, or None."""
        if not self.total or self.free is None:
            return None
        return 1 - self.free / self.total


@dataclass(frozen=True, slots=True)
class GpuReading:
    """All of them, in CUDA's order.

    Attributes:
        gpus: empty if none is visible, or if nothing is known.
        unknown: why nothing is known, or None.
        note: see `Visible`.
    """

    gpus: tuple[GpuMemory, ...] = ()
    unknown: str | None = None
    note: str | None = None


@dataclass(slots=True)
class _Said:
    """What has been logged and still holds, so that it is logged once."""

    reasons: dict[str, str] = field(default_factory=dict)

    def now(self, what: str, reason: str | None) -> None:
        """`what` is unknown because of `reason`, or known again."""
        if reason == self.reasons.get(what):
            return
        if reason is None:
            del self.reasons[what]
            logger.info("%s is known again", what)
        else:
            self.reasons[what] = reason
            logger.warning("%s is unknown: %s", what, reason)


class Gpus:
    """Reads the GPUs that CUDA shows this process.  One thread at a time.

    NVML is loaded when it is first read, not before, and left alone for `retry_s` after it failed.

    Args:
        library: something like the module ``pynvml``; that module, if not given.
        environ: where ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` are looked up.
        retry_s: how long to wait before NVML is started anew after a failure.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        library: Any = None,
        *,
        environ: Mapping[str, str] = os.environ,
        retry_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = library
        self._environ = environ
        self._retry_s = retry_s
        self._clock = clock
        self._visible: Visible | None = None  # None: NVML is not started
        self._handles: list[Any] = []
        self._retry_at: float | None = None
        self._unknown: str | None = None
        self._said = _Said()

    def read(self, *, processes: bool = True) -> GpuReading:
        """How much memory there is now.  Never raises.

        Args:
            processes: ask also who has it, which takes longer than all the rest.
        """
        if self._retry_at is not None and self._clock() >= self._retry_at:
            self.close()
        if self._visible is None and self._retry_at is None:
            self._start()
        if self._visible is None:
            return GpuReading(unknown=self._unknown)
        rows = [
            self._read_one(ordinal, place, handle, processes)
            for ordinal, (place, handle) in enumerate(
                zip(self._visible.places, self._handles, strict=True)
            )
        ]
        return GpuReading(tuple(rows), note=self._visible.note)

    def close(self) -> None:
        """Let go of NVML; the next `read` starts it again.  Idempotent."""
        was_started, self._visible, self._handles = self._visible is not None, None, []
        self._retry_at = None
        if was_started:
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                logger.debug("NVML did not shut down: %s", error)

    # ------------------------------------------------------------------ starting

    def _start(self) -> None:
        try:
            self._nvml = self._nvml or _import()
            self._nvml.nvmlInit()
        except ImportError:
            self._fail(_NO_PYNVML, float("inf"))  # installing it takes a new process
            return
        except self._nvml.NVMLError as error:
            self._fail(_words(error), self._retry_s)
            return
        self._visible, self._retry_at = Visible(()), None
        try:
            listed = [self._list(index) for index in range(self._nvml.nvmlDeviceGetCount())]
        except self._nvml.NVMLError as error:
            self.close()
            self._fail(_words(error), self._retry_s)
            return
        order = self._environ.get("CUDA_DEVICE_ORDER")
        visible = visible_devices(listed, self._environ.get("CUDA_VISIBLE_DEVICES"), order)
        self._visible = visible
        self._handles = [self._handle(place) for place in visible.places]
        self._unknown = None
        self._said.now("GPU memory", None)
        if visible.note:
            self._said.now("the order of GPUs", visible.note)

    def _fail(self, reason: str, retry_s: float) -> None:
        self._unknown, self._retry_at = reason, self._clock() + retry_s
        self._said.now("GPU memory", reason)

    def _list(self, index: int) -> Gpu:
        """One GPU.  A lost one has no name, but is not left out: the others keep their numbers."""
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError:
            return Gpu(index, "", "")
        return Gpu(index, uuid, name, self._list_mig(handle))

    def _list_mig(self, handle: Any) -> tuple[MigPart, ...] | None:
        nvml = self._nvml
        try:
            if nvml.nvmlDeviceGetMigMode(handle)[0] == 0:
                return None
            most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except nvml.NVMLError:  # most GPUs know no MIG
            return None
        parts = []
        for index in range(most):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                uuid = nvml.nvmlDeviceGetUUID(part)
            except nvml.NVMLError:  # indices have gaps
                continue
            instances = [
                self._ask(nvml.nvmlDeviceGetGpuInstanceId, part),
                self._ask(nvml.nvmlDeviceGetComputeInstanceId, part),
            ]
            parts.append(MigPart(index, uuid, *instances))
        return tuple(parts)

    def _handle(self, place: Place) -> Any:
        gpu, part = place
        handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, gpu.index)
        if part is None or handle is None:
            return handle
        return self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, part.index)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    # ------------------------------------------------------------------ reading

    def _read_one(self, ordinal: int, place: Place, handle: Any, processes: bool) -> GpuMemory:
        gpu, part = place
        uuid = part.uuid if part else gpu.uuid
        known: dict[str, Any] = {"name": gpu.name, "is_mig": part is not None}
        unknown = who = None
        try:
            if handle is None:  # it was lost when NVML was started
                handle = self._nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            known |= self._memory(handle)
        except self._nvml.NVMLError as error:
            unknown = _words(error)
            if error.value != _NOT_SUPPORTED:
                # NVML sees a GPU that has come back only after it was started anew.
                again = 0.0 if error.value == _UNINITIALIZED else self._retry_s
                self._retry_at = self._retry_at or self._clock() + again
        self._said.now(f"memory of GPU {uuid or gpu.index}", unknown)
        if processes and unknown is None:
            try:
                who = self._processes(handle)
            except self._nvml.NVMLError as error:
                unknown = f"processes: {_words(error)}"
            self._said.now(f"who uses GPU {uuid or gpu.index}", unknown)
        return GpuMemory(ordinal, gpu.index, uuid, processes=who, unknown=unknown, **known)

    def _memory(self, handle: Any) -> dict[str, int | None]:
        try:
            info = self._nvml.nvmlDeviceGetMemoryInfo(handle, version=_MEMORY_V2)
        except self._nvml.NVMLError as error:
            if error.value not in (_FUNCTION_NOT_FOUND, _NOT_SUPPORTED):
                raise
            info = self._nvml.nvmlDeviceGetMemoryInfo(handle)  # drivers before R510
        fields = {name: int(getattr(info, name)) for name in ("total", "used", "free")}
        return fields | {"reserved": getattr(info, "reserved", None)}

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...]:
        try:
            found = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        except self._nvml.NVMLError as error:
            if error.value != _FUNCTION_NOT_FOUND:
                raise
            found = self._nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
        return tuple(GpuProcess(int(p.pid), p.usedGpuMemory) for p in found)


def _import() -> Any:
    import pynvml

    return pynvml


def _words(error: Any) -> str:
    return _WORDS.get(error.value, str(error))
