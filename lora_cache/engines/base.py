"""The seam between the cache and whatever holds the adapters.

An engine obeys: it carries out the planner's transitions, says what it holds, and turns adapters
into what its requests need.  Nothing outside `lora_cache.engines` knows vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.errors import LoraCacheError
from lora_cache.planner import Holdings, Transition


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can hold and do.  Read from the engine, never configured.

    Attributes:
        name: ``"stock"``, ``"resident"`` or ``"fake"``.
        max_loras, max_cpu_loras: what the engine was started with.
        slots: GPU slots that the cache may fill.
        host_entries: adapters that fit into host memory, those in slots included.
        max_rank: highest rank that a slot can hold.
        stages_without_slot: it can bring an adapter into host memory without using a slot.
        max_in_flight: transitions that it works on at a time, or None for no limit.
        max_speculative: how many it should be given at a time that nobody waits for: it works on
            them in order, and what somebody waits for might come after them.
        tensor_parallel: workers that share the model; each holds copies, or shares, of adapters.
        widths: input and output width of the base model's linear layers, by module name, as far
            as they are known.
    """

    name: str
    max_loras: int
    max_cpu_loras: int
    slots: int
    host_entries: int
    max_rank: int
    stages_without_slot: bool = True
    max_in_flight: int | None = None
    max_speculative: int | None = None
    tensor_parallel: int = 1
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class TransitionFailedError(Exception):
    """Raised by `Engine.apply`: what failed, and which parts took effect all the same.

    Not part of the public error tree: the cache unwraps it.

    Attributes:
        error: what callers are told.
        demoted: victims that lost their slots.
        dropped: victims that left host memory; the newcomer, if it was there and is no more.
    """

    def __init__(
        self,
        error: LoraCacheError,
        *,
        demoted: Iterable[AdapterKey] = (),
        dropped: Iterable[AdapterKey] = (),
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.demoted = frozenset(demoted)
        self.dropped = frozenset(dropped)


class Engine(Protocol):
    """What the cache needs of an engine.  All calls come from one event loop.

    Transitions may be handed over while others run; the engine orders them as it must.  `apply`
    is never cancelled by the cache: a load that was begun runs to its end.
    """

    @property
    def capabilities(self) -> Capabilities:
        """Fixed for the engine's life."""
        ...

    @property
    def host_bytes(self) -> int | None:
        """What it has room for in host memory, in bytes as adapters are charged, once attached.

        None: for any `Capabilities.host_entries` adapters.
        """
        ...

    def charge(self, adapter: Adapter) -> int:
        """What `adapter` is charged in host memory, in bytes: what its copy takes.

        Before there is one: what it may take at most, as far as that can be told.
        """
        ...

    async def attach(self) -> None:
        """Take the engine over, emptying it of adapters that others put there.

        Raises:
            ConfigError: another manager is attached, or the engine is of a refused kind.
        """

    async def detach(self) -> None:
        """Give the engine back as it was found: running, without adapters.  Idempotent."""

    async def apply(self, move: Transition, adapter: Adapter | None) -> None:
        """Carry out one transition.

        The newcomer is made ready first; victims lose their place only when that has succeeded.

        Args:
            adapter: the adapter of ``move.load``; None if and only if that is None.

        Raises:
            TransitionFailedError: it could not be done; says what took effect.
        """

    async def holdings(self) -> Holdings:
        """What the engine holds, asked of the engine itself as far as it can tell.

        Adapters that it holds and that were not loaded by `apply` appear under keys whose digest
        starts with ``"foreign:"``; such keys may be named in ``Transition.drop``.
        """
        ...

    def watch(self, drifted: Callable[[], None]) -> None:
        """Have `drifted` called, on the event loop, when copies moved that no transition moved."""

    def slots(self) -> Mapping[int, AdapterKey]:
        """Slot index → key, as far as the engine knows without being asked."""
        ...

    def conserve(self, is_scarce: bool) -> None:
        """Memory is scarce: from now on hold none but for adapters; or it is so no more."""

    def begin_use(self, key: AdapterKey) -> None:
        """A lease on `key` begins: from now on requests may run with it."""

    def end_use(self, key: AdapterKey) -> None:
        """The last lease on `key` has ended: no request runs with it."""

    def handle(self, key: AdapterKey) -> Any:
        """What a request must carry to run with `key` (vLLM: a ``LoRARequest``)."""

    def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Run one request and stream its outputs, as the engine makes them.

        The generator ends when the request has ended; closing it earlier aborts the request, and
        returns when later commands are sure to come after the abort.

        Raises:
            EngineDeadError: the engine is gone.
            EngineError: the engine refused or failed this request.
        """
        ...
