"""GPU memory: right figures, the right devices, one clear word where nothing can be read."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from lora_cache.memory import GpuMemory, GpuProcess, GpuReading, Gpus
from lora_cache.testing import FakeGpu, FakeMig, FakeNvml
from tests.memory.clock import Seconds

GIB = 1 << 30


class Rig:
    """A fake NVML, and the clock that its reader goes by."""

    def __init__(self, *gpus: FakeGpu, missing: tuple[str, ...] = (), **environ: str) -> None:
        self.nvml = FakeNvml(*gpus, functions_missing=missing)
        self.clock = Seconds()
        self.gpus = Gpus(self.nvml, environ=environ, retry_s=30, clock=self.clock.now)

    def read(self, after_s: float = 0.0, **options: Any) -> GpuReading:
        self.clock.advance(after_s)
        return self.gpus.read(**options)

    def only(self, after_s: float = 0.0) -> GpuMemory:
        (gpu,) = self.read(after_s).gpus
        return gpu


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log has said until now."""
    caplog.set_level(logging.INFO, "lora_cache")
    return lambda: list(caplog.messages)


def test_figures_add_up(said: Callable[[], list[str]]) -> None:
    rig = Rig(FakeGpu("GPU-a", processes={7: 10 * GIB, 8: None}))
    gpu = rig.only()
    assert (gpu.ordinal, gpu.index, gpu.uuid, gpu.is_mig) == (0, 0, "GPU-a", False)
    assert (gpu.total, gpu.used, gpu.reserved) == (80 * GIB, 10 * GIB, GIB // 2)
    assert gpu.total == (gpu.used or 0) + (gpu.free or 0) + (gpu.reserved or 0)
    assert gpu.share == pytest.approx(10.5 / 80)
    assert gpu.processes == (GpuProcess(7, 10 * GIB), GpuProcess(8, None))
    assert gpu.unknown is None
    assert said() == []
    (quick,) = rig.read(processes=False).gpus
    assert (quick.processes, quick.unknown) == (None, None)


def test_a_driver_that_does_not_tell_what_it_reserves() -> None:
    rig = Rig(FakeGpu("GPU-a"), missing=("nvmlDeviceGetMemoryInfo_v2",))
    gpu = rig.only()
    assert (gpu.used, gpu.reserved, gpu.unknown) == (GIB // 2, None, None)
    assert gpu.share == pytest.approx(0.5 / 80)


def test_a_driver_with_older_process_lists() -> None:
    rig = Rig(
        FakeGpu("GPU-a", processes={7: GIB}), missing=("nvmlDeviceGetComputeRunningProcesses_v3",)
    )
    assert rig.only().processes == (GpuProcess(7, GIB),)


def test_the_devices_that_cuda_shows_in_its_order() -> None:
    gpus = [FakeGpu(f"GPU-{letter}", total=n * GIB) for n, letter in enumerate("abcd", 10)]
    rig = Rig(*gpus, CUDA_VISIBLE_DEVICES="2,0")
    found = rig.read().gpus
    assert [(g.ordinal, g.index, g.uuid, g.total) for g in found] == [
        (0, 2, "GPU-c", 12 * GIB),
        (1, 0, "GPU-a", 10 * GIB),
    ]
    assert Rig(*gpus, CUDA_VISIBLE_DEVICES="").read() == GpuReading()


def test_a_mig_device_is_what_a_process_sees() -> None:
    part = FakeMig("MIG-1", total=10 * GIB, index=2, processes={9: GIB})
    rig = Rig(FakeGpu("GPU-a"), FakeGpu("GPU-b", mig=[part]))
    gpu = rig.only()
    assert (gpu.index, gpu.uuid, gpu.is_mig, gpu.total) == (1, "MIG-1", True, 10 * GIB)
    assert gpu.processes == (GpuProcess(9, GIB),)


def test_an_order_that_only_cuda_knows_is_said(said: Callable[[], list[str]]) -> None:
    rig = Rig(FakeGpu("GPU-a", "T4"), FakeGpu("GPU-b", "H100"))
    assert "CUDA_DEVICE_ORDER" in (rig.read().note or "")
    rig.read()
    assert len(said()) == 1


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (12, "there is no NVIDIA driver on this machine"),
        (9, "the NVIDIA driver is not loaded"),
        (18, "reload it, or restart"),
        (4, "no permission"),
        (999, "Unknown Error"),
    ],
)
def test_no_nvml_is_said_once_and_heals(
    said: Callable[[], list[str]], code: int, words: str
) -> None:
    rig = Rig(FakeGpu("GPU-a"))
    rig.nvml.unload_driver(code)
    for _ in range(5):
        reading = rig.read(after_s=1)
        assert reading.gpus == ()
        assert words in (reading.unknown or "")
    assert rig.nvml.calls["nvmlInitWithFlags"] == 1, "it is left alone for a while"
    rig.nvml.load_driver()
    assert rig.read(after_s=30).gpus[0].total == 80 * GIB
    assert len(said()) == 2
    assert words in said()[0]
    assert said()[1] == "GPU memory is known again"


def test_a_driver_that_goes_away_in_between(said: Callable[[], list[str]]) -> None:
    rig = Rig(FakeGpu("GPU-a"))
    assert rig.only().total
    rig.nvml.unload_driver()
    gpu = rig.only()
    assert (gpu.uuid, gpu.total) == ("GPU-a", None)
    assert gpu.unknown
    assert "driver is not loaded" in (rig.read(after_s=1).unknown or ""), "it was started anew"
    rig.nvml.load_driver()
    assert rig.read(after_s=30).gpus[0].total
    assert [line.partition(" is ")[0] for line in said()] == [
        "memory of GPU GPU-a",
        "GPU memory",
        "GPU memory",
        "memory of GPU GPU-a",
    ]


def test_a_lost_gpu_leaves_the_others_known_and_comes_back(said: Callable[[], list[str]]) -> None:
    first, second = FakeGpu("GPU-a"), FakeGpu("GPU-b")
    rig = Rig(first, second)
    assert all(gpu.total for gpu in rig.read().gpus)
    first.lost = True
    for _ in range(3):
        lost, fine = rig.read(after_s=1).gpus
        assert (lost.total, lost.share, lost.processes) == (None, None, None)
        assert "the GPU is lost" in (lost.unknown or "")
        assert fine.total == 80 * GIB
    assert rig.read(after_s=40).gpus[0].total is None, "NVML was started anew, it is still away"
    first.lost = False
    assert all(gpu.total for gpu in rig.read(after_s=40).gpus)
    assert said() == [
        "memory of GPU GPU-a is unknown: the GPU is lost: it fell off the bus, or is being reset",
        "memory of GPU 0 is unknown: the GPU is lost: it fell off the bus, or is being reset",
        "memory of GPU GPU-a is known again",
    ]


def test_a_container_that_may_not_see_processes(said: Callable[[], list[str]]) -> None:
    rig = Rig(FakeGpu("GPU-a"))
    rig.nvml.fail("nvmlDeviceGetComputeRunningProcesses_v3", rig.nvml.NVML_ERROR_NO_PERMISSION)
    for _ in range(3):
        gpu = rig.only()
        assert gpu.total == 80 * GIB
        assert gpu.processes is None
        assert (gpu.unknown or "").startswith("processes: no permission")
    assert len(said()) == 1
    assert rig.nvml.starts == 1, "that is no reason to start NVML anew"


def test_what_is_not_supported_is_not_asked_for_anew(said: Callable[[], list[str]]) -> None:
    rig = Rig(FakeGpu("GPU-a"))
    rig.nvml.fail("nvmlDeviceGetMemoryInfo", rig.nvml.NVML_ERROR_NOT_SUPPORTED)
    for _ in range(3):
        assert "does not support it" in (rig.only(after_s=60).unknown or "")
    assert rig.nvml.starts == 1
    assert len(said()) == 1


def test_close_lets_go_and_read_begins_anew() -> None:
    rig = Rig(FakeGpu("GPU-a"))
    rig.gpus.close()
    rig.only()
    rig.gpus.close()
    rig.gpus.close()
    assert (rig.nvml.starts, rig.nvml.stops) == (1, 1)
    assert rig.only().total
    rig.nvml.fail("nvmlShutdown", 999)
    rig.gpus.close()


def test_without_pynvml_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['pynvml'] = None\n"
        "from lora_cache.memory import Gpus\n"
        "print(Gpus().read().unknown)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pip install 'lora-cache[gpu]'" in done.stdout


def test_with_the_real_library_here() -> None:
    """Whatever this machine has: an answer, and no error of another package."""
    pytest.importorskip("pynvml")
    reading = Gpus().read()
    assert reading.unknown or all(gpu.total or gpu.unknown for gpu in reading.gpus)


def test_importing_it_imports_no_pynvml() -> None:
    code = "import sys, lora_cache.memory; print('pynvml' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False"]
