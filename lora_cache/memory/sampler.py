"""Watches memory from a thread: samples, a short history, pressure levels as events."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lora_cache.errors import ConfigError
from lora_cache.level import Level
from lora_cache.memory.host import Host, HostMemory, ProcessMemory
from lora_cache.memory.nvml import GpuReading, Gpus
from lora_cache.memory.pressure import GPU_MARKS, HOST_MARKS, Marks, Pressure, PressureEvent

logger = logging.getLogger(__name__)

HOST = "host"  #: the name of host memory among resources
_LONGEST_WAIT_S = 60.0

Listener = Callable[[PressureEvent], None]


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory at one moment.

    Attributes:
        at_s: on the sampler's clock.
        host, process: of the machine and of the process; None where the kernel does not say.
    """

    at_s: float
    gpus: GpuReading
    host: HostMemory | None
    process: ProcessMemory | None


@dataclass(frozen=True, slots=True)
class SamplerCost:
    """What sampling has cost.

    Attributes:
        samples: how many were taken after the first.
        cpu_s: CPU time that they took, in user and kernel mode.
        elapsed_s: time since the first one.
        setup_s: CPU time of the first one, which loads NVML.
    """

    samples: int
    cpu_s: float
    elapsed_s: float
    setup_s: float

    @property
    def share(self) -> float:
        """Of one core, 0 to 1."""
        return self.cpu_s / self.elapsed_s if self.elapsed_s > 0 else 0.0


class Sampler:
    """Takes a sample every `period_s`, and says when a pressure level changes.

    It never takes more of a core than `max_share`: if a sample costs more than expected (a machine
    with many GPUs, a slow driver), the next one comes later.  Who uses the GPUs is asked only with
    every `processes_every`-th sample.

    `latest`, `history`, `levels` and `cost` may be read from any thread.  Listeners are called in
    the sampler's thread, one after the other, and must be quick.

    Args:
        gpus: None: do not look at GPUs.
        pid: the process to watch; this one, if not given.
        history: how many samples are kept.
        host_marks: when pressure on host memory begins and ends.
        gpu_marks: likewise on each GPU.
    """

    def __init__(
        self,
        gpus: Gpus | None = None,
        host: Host | None = None,
        *,
        pid: int | None = None,
        period_s: float = 1.0,
        history: int = 300,
        processes_every: int = 10,
        max_share: float = 0.0005,
        host_marks: Marks = HOST_MARKS,
        gpu_marks: Marks = GPU_MARKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (period_s > 0 and history > 0 and processes_every > 0 and max_share > 0):
            raise ConfigError("period_s, history, processes_every and max_share must be positive")
        self._gpus, self._host, self._pid = gpus, host or Host(), pid
        self._period_s, self._max_share = period_s, max_share
        self._processes_every = processes_every
        self._marks = {True: host_marks, False: gpu_marks}
        self._clock = clock
        self._history: deque[MemorySample] = deque(maxlen=history)
        self._pressure: dict[str, Pressure] = {}
        self._listeners: list[Listener] = []
        self._taken, self._cpu_s, self._setup_s = 0, 0.0, 0.0
        self._first_s = self._last_s = clock()
        self._lock = threading.Lock()  # one sample at a time, and consistent figures
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ results

    @property
    def latest(self) -> MemorySample | None:
        """The last sample, or None before the first."""
        try:
            return self._history[-1]
        except IndexError:
            return None

    @property
    def history(self) -> tuple[MemorySample, ...]:
        """The last samples, oldest first."""
        with self._lock:
            return tuple(self._history)

    @property
    def levels(self) -> dict[str, Level]:
        """The pressure on each resource, by its name: ``"host"``, or the UUID of a GPU."""
        with self._lock:
            return {name: pressure.level for name, pressure in self._pressure.items()}

    @property
    def cost(self) -> SamplerCost:
        """What sampling has cost until now."""
        with self._lock:
            samples, elapsed_s = max(0, self._taken - 1), self._last_s - self._first_s
            return SamplerCost(samples, self._cpu_s, elapsed_s, self._setup_s)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called with each change of a level; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    # ------------------------------------------------------------------ sampling

    def sample(self) -> MemorySample:
        """Take one now, in this thread."""
        with self._lock:
            sample, events = self._sample()
        self._tell(events)
        return sample

    def start(self) -> Sampler:
        """Begin, in a thread that does not keep the process alive."""
        if self._thread is None:
            self._ending.clear()
            self._thread = threading.Thread(target=self._run, name="lora-cache-memory", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop, and let go of NVML.  Idempotent; not to be called by a listener."""
        if self._thread is not None:
            self._ending.set()
            self._thread.join()
            self._thread = None
        with self._lock:
            if self._gpus is not None:
                self._gpus.close()

    def __enter__(self) -> Sampler:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._ending.wait(wait_s):
            with self._lock:
                _, events = self._sample()
                # What one costs on average: a single slow one must not make the next one late.
                cpu_s = self._cpu_s / max(1, self._taken - 1)
            self._tell(events)
            wait_s = max(self._period_s, min(_LONGEST_WAIT_S, cpu_s / self._max_share))

    def _sample(self) -> tuple[MemorySample, list[PressureEvent]]:
        """Take one.  Returns also what has changed."""
        began, now = time.thread_time(), self._clock()
        gpus = GpuReading()
        if self._gpus is not None:
            gpus = self._gpus.read(processes=self._taken % self._processes_every == 0)
        sample = MemorySample(now, gpus, self._host.read(), self._host.process(self._pid))
        self._history.append(sample)
        events = self._weigh(sample)
        cpu_s = time.thread_time() - began
        if self._taken == 0:  # that loads NVML, and never happens again
            self._first_s, self._setup_s, cpu_s = now, cpu_s, 0.0
        self._cpu_s += cpu_s
        self._taken, self._last_s = self._taken + 1, now
        return sample, events

    def _weigh(self, sample: MemorySample) -> list[PressureEvent]:
        shares = {HOST: sample.host.share if sample.host else None}
        shares |= {gpu.uuid: gpu.share for gpu in sample.gpus.gpus if gpu.uuid}
        for name in shares:
            if name not in self._pressure:
                self._pressure[name] = Pressure(name, self._marks[name == HOST])
        # One that is not in this sample is not known.
        updates = [p.update(shares.get(name), sample.at_s) for name, p in self._pressure.items()]
        return [event for event in updates if event is not None]

    def _tell(self, events: list[PressureEvent]) -> None:
        for event in events:
            logger.info("%s", event)
            for listener in list(self._listeners):
                try:
                    listener(event)
                except Exception:
                    logger.exception("a listener failed at: %s", event)
