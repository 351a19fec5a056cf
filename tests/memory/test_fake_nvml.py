"""The fake NVML answers as pynvml does: same functions, parameters, codes, errors, fields."""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import pytest

from lora_cache.testing import FakeGpu, FakeMig, FakeNvml
from lora_cache.testing.nvml import _CODES, NVMLError

pynvml: Any = pytest.importorskip("pynvml")

FUNCTIONS = [name for name in dir(FakeNvml) if name.startswith("nvmlDevice")]
FUNCTIONS += ["nvmlInit", "nvmlInitWithFlags", "nvmlShutdown"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_same_parameters(name: str) -> None:
    real = inspect.signature(getattr(pynvml, name)).parameters.values()
    _, *fake = inspect.signature(getattr(FakeNvml, name)).parameters.values()  # without self
    assert [(p.name, p.default) for p in fake] == [(p.name, p.default) for p in real]


@pytest.mark.parametrize(("name", "code"), _CODES.items())
def test_codes_and_errors_are_the_same(name: str, code: int) -> None:
    fake = FakeNvml()
    assert getattr(pynvml, f"NVML_ERROR_{name}") == code == getattr(fake, f"NVML_ERROR_{name}")
    ours, theirs = NVMLError(code), pynvml.NVMLError(code)
    assert type(ours).__name__ == type(theirs).__name__
    assert type(ours) is getattr(fake, type(theirs).__name__)
    assert (ours.value, str(ours)) == (theirs.value, str(theirs))
    assert isinstance(ours, fake.NVMLError)


def test_an_unknown_code_is_the_plain_error() -> None:
    assert type(NVMLError(77)) is NVMLError
    assert type(pynvml.NVMLError(77)) is pynvml.NVMLError


def test_memory_has_the_same_fields() -> None:
    fake = FakeNvml(FakeGpu("GPU-a", processes={7: 1 << 30}))
    fake.nvmlInit()
    handle = fake.nvmlDeviceGetHandleByIndex(0)
    assert pynvml.nvmlMemory_v2 == fake.nvmlMemory_v2
    for version, struct in (
        (None, pynvml.c_nvmlMemory_t),
        (fake.nvmlMemory_v2, pynvml.c_nvmlMemory_v2_t),
    ):
        info = fake.nvmlDeviceGetMemoryInfo(handle, version)
        assert set(vars(info)) == {name for name, _ in struct._fields_}
        parts = info.used + info.free + getattr(info, "reserved", 0)
        assert parts == info.total, "as the driver's do"


def test_processes_have_the_same_fields() -> None:
    fake = FakeNvml(FakeGpu("GPU-a", processes={7: 1 << 30, 8: None}))
    fake.nvmlInit()
    found = fake.nvmlDeviceGetComputeRunningProcesses(fake.nvmlDeviceGetHandleByIndex(0))
    assert [(p.pid, p.usedGpuMemory) for p in found] == [(7, 1 << 30), (8, None)]
    for process in found:
        assert set(vars(process)) == {name for name, _ in pynvml.c_nvmlProcessInfo_v3_t._fields_}
        assert process.gpuInstanceId == ctypes.c_uint(-1).value


def test_mig_devices_are_found_below_their_gpu() -> None:
    part = FakeMig("MIG-1", index=2, gpu_instance=5, processes={9: 1 << 20})
    fake = FakeNvml(
        FakeGpu("GPU-a"), FakeGpu("GPU-b", mig=[part]), FakeGpu("GPU-c", knows_mig=False)
    )
    fake.nvmlInit()
    handles = [fake.nvmlDeviceGetHandleByIndex(index) for index in range(fake.nvmlDeviceGetCount())]
    assert [fake.nvmlDeviceGetMigMode(handle) for handle in handles[:2]] == [[0, 0], [1, 1]]
    with pytest.raises(NVMLError, match="Not Supported"):
        fake.nvmlDeviceGetMigMode(handles[2])
    assert [fake.nvmlDeviceGetMaxMigDeviceCount(handle) for handle in handles] == [7, 7, 0]
    with pytest.raises(NVMLError, match="Not Found"):
        fake.nvmlDeviceGetMigDeviceHandleByIndex(handles[1], 0)
    mig = fake.nvmlDeviceGetMigDeviceHandleByIndex(handles[1], 2)
    assert fake.nvmlDeviceGetUUID(mig) == "MIG-1"
    assert fake.nvmlDeviceIsMigDeviceHandle(mig).value == 1
    assert fake.nvmlDeviceIsMigDeviceHandle(handles[1]).value == 0
    parent = fake.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
    assert fake.nvmlDeviceGetUUID(parent) == "GPU-b"
    (process,) = fake.nvmlDeviceGetComputeRunningProcesses(mig)
    assert (process.pid, process.gpuInstanceId, process.computeInstanceId) == (9, 5, 0)
    for uuid in ("MIG-1", "GPU-c"):
        assert fake.nvmlDeviceGetUUID(fake.nvmlDeviceGetHandleByUUID(uuid)) == uuid


def test_without_init_nothing_works() -> None:
    fake = FakeNvml(FakeGpu("GPU-a"))
    with pytest.raises(NVMLError, match="Uninitialized"):
        fake.nvmlDeviceGetCount()
    with pytest.raises(pynvml.NVMLError, match="Uninitialized"):
        pynvml.nvmlDeviceGetCount()


def test_a_lost_gpu_comes_back_only_for_who_starts_anew() -> None:
    gpu = FakeGpu("GPU-a")
    fake = FakeNvml(gpu)
    fake.nvmlInit()
    handle = fake.nvmlDeviceGetHandleByIndex(0)
    gpu.lost = True
    with pytest.raises(NVMLError, match="GPU is lost"):
        fake.nvmlDeviceGetUUID(handle)
    gpu.lost = False
    with pytest.raises(NVMLError, match="GPU is lost"):
        fake.nvmlDeviceGetHandleByIndex(0)
    fake.nvmlShutdown()
    fake.nvmlInit()
    assert fake.nvmlDeviceGetUUID(fake.nvmlDeviceGetHandleByIndex(0)) == "GPU-a"
