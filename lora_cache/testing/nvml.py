"""An NVML without GPUs, to be used in place of the module ``pynvml`` (nvidia-ml-py).

The functions have pynvml's names and parameters, raise its errors with its codes, and return
objects with its field names; a test of this package compares them with the real module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

_NONE = 0xFFFFFFFF  # NVML's "no instance"


class NVMLError(Exception):
    """As pynvml's: `value` is the code.  Each code has a subclass, e.g. `NVMLError_GpuIsLost`."""

    names: ClassVar[dict[int, str]] = {
        1: "Uninitialized",
        2: "Invalid Argument",
        3: "Not Supported",
        4: "Insufficient Permissions",
        6: "Not Found",
        9: "Driver Not Loaded",
        12: "NVML Shared Library Not Found",
        13: "Function Not Found",
        15: "GPU is lost",
        16: "GPU requires restart",
        18: "RM has detected an NVML/RM version mismatch.",
        999: "Unknown Error",
    }
    _classes: ClassVar[dict[int, type[NVMLError]]] = {}

    def __new__(cls, value: int) -> NVMLError:
        return super().__new__(cls._classes.get(value, cls) if cls is NVMLError else cls, value)

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return self.names.get(self.value, f"NVML Error with code {self.value}")


_CODES = {
    "UNINITIALIZED": 1,
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "LIBRARY_NOT_FOUND": 12,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "RESET_REQUIRED": 16,
    "LIB_RM_VERSION_MISMATCH": 18,
    "UNKNOWN": 999,
}
for _name, _value in _CODES.items():
    _class = "NVMLError_" + _name.title().replace("_", "")
    NVMLError._classes[_value] = type(_class, (NVMLError,), {"__module__": __name__})


@dataclass
class FakeMig:
    """A MIG device; bytes.

    Attributes:
        index: its place in the GPU's list, which may have gaps.
        processes: bytes used, by pid; None where the driver does not say.
    """

    uuid: str
    total: int = 10 << 30
    index: int = 0
    gpu_instance: int = 1
    compute_instance: int = 0
    reserved: int = 0
    processes: dict[int, int | None] = field(default_factory=dict)


@dataclass
class FakeGpu:
    """A GPU; bytes.

    Attributes:
        reserved: by the driver.
        mig: its MIG devices; None while MIG is off, or if it knows no MIG (`knows_mig`).
        processes: bytes used, by pid; None where the driver does not say.
    """

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 << 30
    reserved: int = 512 << 20
    mig: list[FakeMig] | None = None
    knows_mig: bool = True
    processes: dict[int, int | None] = field(default_factory=dict)
    lost: bool = False


class FakeNvml:
    """The module, as far as this package uses it.

    Args:
        gpus: in NVML's order; change them as the test goes on.
        functions_missing: names of functions that this driver does not have yet, e.g.
            ``"nvmlDeviceGetMemoryInfo_v2"``.

    Attributes:
        starts, stops: how often NVML was started and shut down.
        calls: how often each function was called.
        init_error: the code with which `nvmlInit` fails, or 0: no library, no driver.
    """

    NVMLError = NVMLError
    nvmlMemory_v2 = 0x02000028  # noqa: N815 - pynvml's name

    def __init__(self, *gpus: FakeGpu, functions_missing: tuple[str, ...] = ()) -> None:
        self.gpus = list(gpus)
        self.functions_missing = functions_missing
        self.init_error = 0
        self.starts = self.stops = 0
        self.calls: dict[str, int] = {}
        self._faults: dict[str, int] = {}
        self._generation = 0  # handles of an earlier one are stale
        self._running = 0
        self._seen_lost: set[int] = set()  # GPUs that were lost since NVML was started

    def __getattr__(self, name: str) -> Any:
        """The constants and the classes of single errors."""
        if name.startswith("NVML_ERROR_") and name[11:] in _CODES:
            return _CODES[name[11:]]
        for made in NVMLError._classes.values():
            if made.__name__ == name:
                return made
        raise AttributeError(name)

    # ------------------------------------------------------------------ faults

    def fail(self, function: str, code: int) -> None:
        """Let each call of `function` fail with an error of `code`; 0 ends that."""
        self._faults[function] = code

    def unload_driver(self, code: int = 9) -> None:
        """From now on nothing works; `load_driver` ends that."""
        self.init_error, self._running, self._generation = code, 0, self._generation + 1

    def load_driver(self) -> None:
        """NVML can be started again."""
        self.init_error = 0

    # ------------------------------------------------------------------ pynvml

    # ruff: noqa: N802, N803 - the names are pynvml's

    def nvmlInit(self) -> None:
        self.nvmlInitWithFlags(0)

    def nvmlInitWithFlags(self, flags: int) -> None:
        self._called("nvmlInitWithFlags", running=False)
        if self.init_error:
            raise NVMLError(self.init_error)
        self._running += 1
        self.starts += 1
        if self._running == 1:
            self._generation += 1
            self._seen_lost.clear()

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")
        self._running -= 1
        self.stops += 1

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        self._called("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self.gpus):
            raise NVMLError(_CODES["INVALID_ARGUMENT"])
        return self._handle(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str | bytes) -> Any:
        self._called("nvmlDeviceGetHandleByUUID")
        wanted = uuid.decode() if isinstance(uuid, bytes) else uuid
        for index, gpu in enumerate(self.gpus):
            if gpu.uuid == wanted:
                return self._handle(index)
            for part in gpu.mig or ():
                if part.uuid == wanted:
                    return self._handle(index, part)
        raise NVMLError(_CODES["NOT_FOUND"])

    def nvmlDeviceGetIndex(self, handle: Any) -> int:
        device = self._device("nvmlDeviceGetIndex", handle)
        return int(handle.index if isinstance(device, FakeGpu) else device.index)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(self._device("nvmlDeviceGetUUID", handle).uuid)

    def nvmlDeviceGetName(self, handle: Any) -> str:
        self._device("nvmlDeviceGetName", handle)
        return str(self.gpus[handle.index].name)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: int | None = None) -> Any:
        device = self._device("nvmlDeviceGetMemoryInfo", handle)
        used = sum(n or 0 for n in device.processes.values())
        free = device.total - device.reserved - used
        if not version:
            # The first version counts what the driver reserves as used.
            return SimpleNamespace(total=device.total, free=free, used=used + device.reserved)
        self._called("nvmlDeviceGetMemoryInfo_v2")
        if version != self.nvmlMemory_v2:
            raise NVMLError(25)
        return SimpleNamespace(
            version=version, total=device.total, reserved=device.reserved, free=free, used=used
        )

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        return self.nvmlDeviceGetComputeRunningProcesses_v3(handle)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any) -> list[Any]:
        return self._processes("nvmlDeviceGetComputeRunningProcesses_v3", handle)

    def nvmlDeviceGetComputeRunningProcesses_v2(self, handle: Any) -> list[Any]:
        return self._processes("nvmlDeviceGetComputeRunningProcesses_v2", handle)

    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:
        gpu = self._device("nvmlDeviceGetMigMode", device)
        if not getattr(gpu, "knows_mig", False):
            raise NVMLError(_CODES["NOT_SUPPORTED"])
        return [int(gpu.mig is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:
        gpu = self._device("nvmlDeviceGetMaxMigDeviceCount", device)
        return 7 if getattr(gpu, "knows_mig", False) else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any:
        gpu = self._device("nvmlDeviceGetMigDeviceHandleByIndex", device)
        for part in gpu.mig or ():
            if part.index == index:
                return self._handle(device.index, part)
        raise NVMLError(_CODES["NOT_FOUND"])

    def nvmlDeviceIsMigDeviceHandle(self, device: Any) -> Any:
        found = self._device("nvmlDeviceIsMigDeviceHandle", device)
        return SimpleNamespace(value=int(isinstance(found, FakeMig)))  # pynvml: a c_uint

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: Any) -> Any:
        self._device("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", migDevice)
        return self._handle(migDevice.index)

    def nvmlDeviceGetGpuInstanceId(self, device: Any) -> int:
        return int(self._mig("nvmlDeviceGetGpuInstanceId", device).gpu_instance)

    def nvmlDeviceGetComputeInstanceId(self, device: Any) -> int:
        return int(self._mig("nvmlDeviceGetComputeInstanceId", device).compute_instance)

    # ------------------------------------------------------------------ inside

    def _called(self, function: str, *, running: bool = True) -> None:
        self.calls[function] = self.calls.get(function, 0) + 1
        if running and not self._running:
            raise NVMLError(_CODES["UNINITIALIZED"])
        if function in self.functions_missing:
            raise NVMLError(_CODES["FUNCTION_NOT_FOUND"])
        if code := self._faults.get(function, 0):
            raise NVMLError(code)

    def _handle(self, index: int, part: FakeMig | None = None) -> Any:
        self._check_lost(index)
        return SimpleNamespace(index=index, part=part, generation=self._generation)

    def _device(self, function: str, handle: Any) -> Any:
        self._called(function)
        if handle.generation != self._generation:
            raise NVMLError(_CODES["INVALID_ARGUMENT"])
        self._check_lost(handle.index)
        return handle.part or self.gpus[handle.index]

    def _check_lost(self, index: int) -> None:
        """A lost GPU stays lost for whoever had started NVML before."""
        if self.gpus[index].lost:
            self._seen_lost.add(index)
        if index in self._seen_lost:
            raise NVMLError(_CODES["GPU_IS_LOST"])

    def _mig(self, function: str, handle: Any) -> FakeMig:
        device = self._device(function, handle)
        if not isinstance(device, FakeMig):
            raise NVMLError(_CODES["NOT_SUPPORTED"])
        return device

    def _processes(self, function: str, handle: Any) -> list[Any]:
        device = self._device(function, handle)
        instances = (_NONE, _NONE)
        if isinstance(device, FakeMig):
            instances = (device.gpu_instance, device.compute_instance)
        return [
            SimpleNamespace(
                pid=pid,
                usedGpuMemory=used,
                gpuInstanceId=instances[0],
                computeInstanceId=instances[1],
            )
            for pid, used in device.processes.items()
        ]
