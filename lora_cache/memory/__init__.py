"""What memory there is, on the GPUs and on the host, and when it grows scarce."""

from lora_cache.level import Level
from lora_cache.memory.host import Host, HostMemory, ProcessMemory
from lora_cache.memory.nvml import GpuMemory, GpuProcess, GpuReading, Gpus
from lora_cache.memory.pressure import Marks, Pressure, PressureEvent
from lora_cache.memory.sampler import MemorySample, Sampler, SamplerCost
from lora_cache.memory.visible import Gpu, MigPart, Visible, visible_devices

__all__ = [
    "Gpu",
    "GpuMemory",
    "GpuProcess",
    "GpuReading",
    "Gpus",
    "Host",
    "HostMemory",
    "Level",
    "Marks",
    "MemorySample",
    "MigPart",
    "Pressure",
    "PressureEvent",
    "ProcessMemory",
    "Sampler",
    "SamplerCost",
    "Visible",
    "visible_devices",
]
