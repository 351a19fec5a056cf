"""An engine without vLLM: for speed, for faults, and for tests of whatever drives an engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.engines import Capabilities, TransitionFailedError
from lora_cache.errors import ConfigError, EngineDeadError, LoadFailedError, LoraCacheError
from lora_cache.planner import Holdings, Transition
from lora_cache.state import Tier
from lora_cache.testing.clock import ManualClock


@dataclass(frozen=True, slots=True)
class FakeOutput:
    """What `FakeEngine.generate` yields: cumulative text, as vLLM's default."""

    request_id: str
    text: str
    finished: bool


class FakeEngine:
    """Holds adapters by name only, and is strict: what would harm vLLM is an AssertionError.

    Adapters are read side by side; slots are written, and copies dropped, one at a time.

    Args:
        slots: capacity in GPU slots.
        host_entries: capacity of host memory, in adapters.
        stages_without_slot: True like the resident engine, or False like the stock one.
        max_in_flight: None like the resident engine, or 1 like the stock one.
        max_speculative: loads at a time that nobody waits for; None for any number.
        load_s: how long a read from disk takes, on `clock`; 0 takes no time at all.
        activate_s: how long a write into a slot takes.
        step_s: how long one token takes.
        tokens: length of every answer.
        clock: needed for times other than 0.

    Attributes:
        loads: how often each key was read from disk.
        activations: how often each key was written into a slot.
        hidden_loads: requests that ran without their adapter in a slot; stock vLLM would have
            stalled everybody to load it.
    """

    def __init__(
        self,
        slots: int = 2,
        host_entries: int = 4,
        *,
        max_rank: int = 64,
        stages_without_slot: bool = True,
        max_in_flight: int | None = None,
        max_speculative: int | None = None,
        load_s: float = 0.0,
        activate_s: float = 0.0,
        step_s: float = 0.0,
        tokens: int = 3,
        clock: ManualClock | None = None,
    ) -> None:
        self._capabilities = Capabilities(
            name="fake",
            max_loras=slots,
            max_cpu_loras=host_entries,
            slots=slots,
            host_entries=host_entries,
            max_rank=max_rank,
            stages_without_slot=stages_without_slot,
            max_in_flight=max_in_flight,
            max_speculative=max_speculative,
        )
        self.host_bytes: int | None = None
        self.load_s, self.activate_s, self.step_s = load_s, activate_s, step_s
        self.tokens = tokens
        self._clock = clock
        self._slots: list[AdapterKey | None] = [None] * slots
        self._host: set[AdapterKey] = set()
        self._running: Counter[AdapterKey] = Counter()
        self._order = asyncio.Lock()
        self._faults: dict[str, list[LoraCacheError]] = {}
        self._attached = False
        self._dead = False
        self._drifted: Callable[[], None] = lambda: None
        self.loads: Counter[AdapterKey] = Counter()
        self.activations: Counter[AdapterKey] = Counter()
        self.uses: Counter[AdapterKey] = Counter()
        self.hidden_loads = 0

    # ------------------------------------------------------------------ faults

    def fail_next(self, name: str, error: LoraCacheError | None = None) -> None:
        """Let the next load of the adapter called `name` fail."""
        error = error or LoadFailedError(f"injected: {name} does not load")
        self._faults.setdefault(name, []).append(error)

    def lose(self, key: AdapterKey, tier: Tier = Tier.HOST) -> None:
        """Lose a copy behind the cache's back (`GPU`: the slot only)."""
        self._vacate(key)
        if tier is Tier.HOST:
            self._host.discard(key)

    def plant(self, key: AdapterKey) -> None:
        """Hold an adapter in host memory that nobody asked for."""
        self._host.add(key)

    def tell(self) -> None:
        """Say, as a worker does, that copies have moved by themselves (see `lose`, `plant`)."""
        self._drifted()

    def die(self) -> None:
        """The engine process is gone."""
        self._dead = True

    # ------------------------------------------------------------------ Engine

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def charge(self, adapter: Adapter) -> int:
        return adapter.nbytes

    async def attach(self) -> None:
        if self._attached:
            raise ConfigError("this engine already has a manager: close the other one first")
        self._attached = True

    async def detach(self) -> None:
        if self._attached and not self._dead:
            for key in self._host - self.uses.keys():
                self._vacate(key)
            self._host &= self.uses.keys()
        self._attached = False

    async def apply(self, move: Transition, adapter: Adapter | None) -> None:
        self._require_alive()
        assert (adapter and adapter.key) == move.load, "adapter and transition disagree"
        leaving = {*move.demote, *move.drop}
        assert not leaving & self.uses.keys(), "a victim is in use"
        assert not leaving & self._running.keys(), "a victim has running requests"
        if adapter is not None:
            await self._read(adapter)
        async with self._order:
            if move.to is Tier.GPU:
                await self._sleep(self.activate_s)
            self._require_alive()
            for key in leaving:
                self._vacate(key)
            if adapter is not None:
                self._host.add(adapter.key)
                if move.to is Tier.GPU:
                    self._occupy(adapter.key)
            self._host -= set(move.drop)
            assert len(self._host) <= self._capabilities.host_entries, "host memory overflows"

    async def holdings(self) -> Holdings:
        async with self._order:
            if self._dead:
                raise EngineDeadError("the engine has died")
            return Holdings(self.slots(), frozenset(self._host))

    def slots(self) -> dict[int, AdapterKey]:
        return {i: key for i, key in enumerate(self._slots) if key is not None}

    def watch(self, drifted: Callable[[], None]) -> None:
        self._drifted = drifted

    def conserve(self, is_scarce: bool) -> None:
        pass

    def begin_use(self, key: AdapterKey) -> None:
        self.uses[key] += 1

    def end_use(self, key: AdapterKey) -> None:
        self.uses[key] -= 1
        if not self.uses[key]:
            del self.uses[key]

    def handle(self, key: AdapterKey) -> Any:
        return key

    async def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[FakeOutput, None]:
        if key is not None:
            self._running[key] += 1
        text = f"{key.name if key else 'base'}:"
        try:
            for step in range(self.tokens):
                await self._sleep(self.step_s)
                if self._dead:
                    raise EngineDeadError("the engine has died: build a new engine and cache")
                if key is not None and key not in self._slots:
                    self.hidden_loads += 1
                text += f" {step}"
                yield FakeOutput(request_id, text, step == self.tokens - 1)
        finally:
            if key is not None:
                self._running[key] -= 1
                self._running += Counter()  # forget zeros

    # ------------------------------------------------------------------ inside

    async def _read(self, adapter: Adapter) -> None:
        key = adapter.key
        if faults := self._faults.get(key.name):
            await self._sleep(self.load_s)
            raise TransitionFailedError(faults.pop(0))
        if key not in self._host:
            self.loads[key] += 1
            await self._sleep(self.load_s)

    def _occupy(self, key: AdapterKey) -> None:
        if key not in self._slots:
            assert None in self._slots, "no slot was freed for the newcomer"
            self._slots[self._slots.index(None)] = key
            self.activations[key] += 1

    def _vacate(self, key: AdapterKey) -> None:
        if key in self._slots:
            self._slots[self._slots.index(key)] = None

    async def _sleep(self, seconds: float) -> None:
        if self._clock is not None and seconds > 0:
            await self._clock.sleep(seconds)
        else:
            await asyncio.sleep(0)

    def _require_alive(self) -> None:
        if self._dead:
            raise TransitionFailedError(EngineDeadError("the engine has died"))
