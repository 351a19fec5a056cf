"""The sampler: bounded history, events in order, next to no cost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lora_cache.errors import ConfigError
from lora_cache.memory import Gpus, Host, HostMemory, Level, Marks, PressureEvent, Sampler
from lora_cache.testing import FakeGpu, FakeNvml
from tests.memory.clock import Seconds

GIB = 1 << 30


class FakeHost(Host):
    """One whose memory the test decides on."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.available: int | None = 50

    def read(self) -> HostMemory | None:
        return None if self.available is None else HostMemory(100, self.available)


def make(*gpus: FakeGpu, clock: Seconds | None = None, **options: Any) -> Sampler:
    clock = clock or Seconds()
    reader = Gpus(FakeNvml(*gpus), environ={}, clock=clock.now) if gpus else None
    options.setdefault("host", FakeHost())
    return Sampler(reader, clock=clock.now, **options)


def test_history_is_bounded_and_in_order() -> None:
    clock = Seconds()
    sampler = make(FakeGpu("GPU-a"), clock=clock, history=3)
    assert (sampler.latest, sampler.history) == (None, ())
    for _ in range(5):
        clock.advance(1)
        sample = sampler.sample()
    assert [s.at_s for s in sampler.history] == [3, 4, 5]
    assert sampler.latest is sample
    assert sample.host == HostMemory(100, 50)
    assert sample.gpus.gpus[0].total == 80 * GIB
    assert sampler.levels == {"host": Level.NONE, "GPU-a": Level.NONE}


def test_who_uses_the_gpus_is_asked_now_and_then() -> None:
    sampler = make(FakeGpu("GPU-a", processes={1: GIB}), processes_every=3)
    asked = [sampler.sample().gpus.gpus[0].processes is not None for _ in range(7)]
    assert asked == [True, False, False, True, False, False, True]


def test_levels_are_events() -> None:
    clock, gpu, host = Seconds(), FakeGpu("GPU-a"), FakeHost()
    marks = Marks(soft=0.8, hard=0.9, band=0.1, dwell_s=2)
    sampler = make(gpu, clock=clock, host=host, host_marks=marks, gpu_marks=marks)
    events: list[PressureEvent] = []
    stop = sampler.subscribe(events.append)

    def go(available: int | None, used: int) -> None:
        host.available, gpu.processes[1] = available, used
        clock.advance(1)
        sampler.sample()

    go(50, 0)
    go(15, 70 * GIB)
    go(5, 79 * GIB)
    go(None, 0)
    assert [(e.at_s, e.resource, e.before.label, e.after.label) for e in events] == [
        (2, "host", "none", "soft"),
        (2, "GPU-a", "none", "soft"),
        (3, "host", "soft", "hard"),
        (3, "GPU-a", "soft", "hard"),
    ]
    gpu.lost = True
    for _ in range(4):
        go(50, 0)
    assert sampler.levels == {"GPU-a": Level.HARD, "host": Level.NONE}, "a lost GPU keeps its level"
    stop()
    stop()
    go(1, 0)
    assert len(events) == 5


def test_a_listener_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    host = FakeHost()
    sampler = make(host=host)
    heard: list[PressureEvent] = []

    def fail(event: PressureEvent) -> None:
        raise RuntimeError("no")

    sampler.subscribe(fail)
    sampler.subscribe(heard.append)
    host.available = 1
    sampler.sample()
    assert len(heard) == 1
    assert "a listener failed" in caplog.messages[-1]


@pytest.mark.parametrize("wrong", [{"period_s": 0}, {"history": 0}, {"max_share": 0}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        make(**wrong)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "lora-cache-memory"]


def test_the_thread_samples_and_ends() -> None:
    nvml = FakeNvml(FakeGpu("GPU-a"))
    with Sampler(Gpus(nvml, environ={}), FakeHost(), period_s=0.01, max_share=1) as sampler:
        sampler.start()  # once more changes nothing
        assert threads() == ["lora-cache-memory"]
        until = time.monotonic() + 20
        while len(sampler.history) < 5 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(sampler.history) >= 5
    assert threads() == []
    assert (nvml.starts, nvml.stops) == (1, 1)
    sampler.close()


def test_closing_does_not_wait_for_the_period() -> None:
    began = time.monotonic()
    with Sampler(None, FakeHost(), period_s=3600):
        pass
    assert time.monotonic() - began < 10


def test_loading_nvml_once_does_not_slow_it_down() -> None:
    class SlowAtFirst(FakeHost):
        reads = 0

        def read(self) -> HostMemory | None:
            self.reads += 1
            began = time.thread_time()
            while self.reads == 1 and time.thread_time() - began < 0.05:
                pass
            return super().read()

    with Sampler(None, SlowAtFirst(), period_s=0.01) as sampler:
        until = time.monotonic() + 20
        while len(sampler.history) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.monotonic() < until
    assert sampler.cost.setup_s >= 0.05


@pytest.mark.long
def test_it_never_takes_more_of_a_core_than_it_may() -> None:
    class Slow(FakeHost):
        def read(self) -> HostMemory | None:
            began = time.thread_time()
            while time.thread_time() - began < 0.01:
                pass
            return super().read()

    with Sampler(None, Slow(), period_s=0.001, max_share=0.1) as sampler:
        time.sleep(1.5)
        cost = sampler.cost
    assert cost.samples >= 3
    assert 0 < cost.share <= 0.12, "one sample every 0.1 s, not one every 0.01 s"


@pytest.mark.parametrize("real_host", [True, False])
def test_it_costs_less_than_a_thousandth_of_a_core(real_host: bool) -> None:
    """Eight GPUs of twenty processes; figures: ``python -m benchmarks.bench_memory``."""
    gpus = [FakeGpu(f"GPU-{n}", processes=dict.fromkeys(range(20), 1 << 20)) for n in range(8)]
    host = Host() if real_host else FakeHost()
    sampler = Sampler(Gpus(FakeNvml(*gpus), environ={}), host)  # one sample a second
    for _ in range(101):
        sampler.sample()
    cost = sampler.cost
    assert cost.samples == 100
    assert cost.cpu_s / cost.samples < 0.001 * 1.0
