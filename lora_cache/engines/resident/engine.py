"""The resident engine: explicit slots inside vLLM, filled beside the step loop.

The manager decides who is in which slot, the packer writes images into the arena, an agent thread
in each of vLLM's workers copies them into slots and publishes them.  Needs a vLLM that was started
with ``LORA_CACHE_RESIDENT=1`` in its environment (`plugin`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.engines import FORCE, SWITCH
from lora_cache.engines.base import Capabilities, TransitionFailedError
from lora_cache.engines.managed import FOREIGN, ManagedVllm
from lora_cache.engines.resident import compat, wire
from lora_cache.engines.resident.arena import Arena, ArenaFullError
from lora_cache.engines.resident.budget import budget
from lora_cache.engines.resident.charges import Charges
from lora_cache.engines.resident.host_images import HostImages, Image, LoadTimes
from lora_cache.engines.resident.layout import Layout
from lora_cache.engines.resident.packing_line import PackingLine
from lora_cache.engines.resident.workers import WorkerError, WorkerLostError, Workers
from lora_cache.engines.widths import widths_of
from lora_cache.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    LoraCacheError,
)
from lora_cache.memory import Host
from lora_cache.paths import cache_home
from lora_cache.planner import Holdings, Transition
from lora_cache.state import Tier

logger = logging.getLogger(__name__)

_HELLO_S = 60.0
_KEPT_TIMES = 1000
#: One is packed while the pages of the next come.
_SPECULATIVE = 2


class ResidentEngine(ManagedVllm):
    """vLLM with slots of our own.

    Args:
        target: a `vllm.AsyncLLM` or a `vllm.LLM`, started with ``enable_lora=True`` and
            ``LORA_CACHE_RESIDENT=1`` in the environment.
        host_bytes: what adapters may take in host memory; if None, up to half of the memory that
            is available when it is attached.
        image_dir: where packed images are kept on disk; ``images`` in `cache_home`, if None.
        image_bytes: what they may take there together; 0: none are kept.

    Attributes:
        host_bytes: as given; if None was, what there is room for, unless that is enough for
            ``max_cpu_loras`` adapters of the largest rank.
        displaced: how often a slot changed without our word: a request ran that no lease had
            announced, somebody else called vLLM, or vLLM dropped its adapters.
        load_times: where the time of the last loads went, the latest last.

    Raises:
        ConfigError: LoRA is off, or the topology is one that cannot be managed.
    """

    def __init__(
        self,
        target: Any,
        host_bytes: int | None = None,
        image_dir: Path | None = None,
        image_bytes: int = 0,
    ) -> None:
        super().__init__(target)
        self.host_bytes = host_bytes
        self._image_dir = image_dir or cache_home() / "images"
        self._image_bytes = image_bytes
        self._capabilities = _read_capabilities(self._client.vllm_config)
        self._workers = Workers(self._on_displaced, self._on_lost)
        self._arena: Arena | None = None
        self._line: PackingLine | None = None
        self._images: HostImages | None = None
        self._charges: Charges | None = None
        self._slots: dict[int, AdapterKey] = {}
        self._reserved: set[int] = set()  # slots that a transition in flight writes
        self._lost = False
        self.displaced = 0
        self.load_times: deque[LoadTimes] = deque(maxlen=_KEPT_TIMES)
        self._begun: dict[AdapterKey, LoadTimes] = {}  # of what was read to get a slot next
        self._drifted: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------ attach, detach

    async def attach(self) -> None:
        self._claim()
        try:
            await self._connect()
        except BaseException:
            await self._release()
            self._disclaim()
            raise

    async def _connect(self) -> None:
        from vllm.lora.request import LoRARequest

        path = await self._workers.listen()
        door = LoRARequest(lora_name=wire.ATTACH, lora_int_id=self._fresh_id(), lora_path=path)
        try:
            await self._client.add_lora(door)
        except Exception as error:  # stock vLLM looks for an adapter there
            if self._client.is_dead:
                raise self._map(error, "vLLM did not answer") from error
            never_run = compat.never_run()
            value = FORCE if never_run else "1"
            why = f"{error}; {never_run}" if never_run else error
            raise ConfigError(
                f"this vLLM does not let the resident engine in ({why}): start it with "
                f"{SWITCH}={value} in its environment, or use the stock engine"
            ) from error
        try:
            await self._workers.gather(_HELLO_S)
        except WorkerLostError as error:
            raise EngineError(f"vLLM's workers did not connect: {error}") from error
        layouts = [
            msgspec.msgpack.decode(worker.hello.layout, type=Layout) for worker in self._workers.all
        ]
        found = budget(layouts, self._capabilities, self.host_bytes, Host().read())
        self.host_bytes = found.host_bytes
        self._arena = Arena(found.arena_bytes)
        self._line = PackingLine(self._arena, layouts, self._image_dir, self._image_bytes)
        await self._line.start()
        self._images = HostImages(self._workers, self._arena, self._line)
        self._charges = Charges(layouts)
        self._workers.tell(wire.Welcome(self._arena.path, self._arena.nbytes))

    async def detach(self) -> None:
        if self._disclaim():
            await self._release()
            await self._client.close()

    async def _release(self) -> None:
        await self._workers.close()
        if self._images is not None:
            await self._images.close()
            self._images = None
        if self._line is not None:
            await self._line.close()
            self._line = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        self._slots.clear()
        self._reserved.clear()
        self._begun.clear()

    # ------------------------------------------------------------------ transitions

    async def apply(self, move: Transition, adapter: Adapter | None) -> None:
        demoted: list[AdapterKey] = []
        try:
            if adapter is not None:
                await self._bring_in(move, adapter, demoted)
            leaving = [key for key in (*move.demote, *move.drop) if key not in demoted]
            await self._empty(leaving)
            if self._images is not None:
                await self._images.drop(move.drop, again=adapter is not None)
            for key in move.drop:
                self._begun.pop(key, None)
        except TransitionFailedError:
            raise
        except WorkerError as error:
            raise TransitionFailedError(
                self._error(error, f"vLLM did not drop {move.drop}"), demoted=demoted
            ) from error

    async def _bring_in(
        self, move: Transition, adapter: Adapter, demoted: list[AdapterKey]
    ) -> None:
        if self._images is None:
            raise TransitionFailedError(
                EngineDeadError("the engine is gone; build a new engine and cache")
            )
        fresh = adapter.key not in self._images
        lora_id = self._request_for(adapter).lora_int_id
        times = self._begun.pop(adapter.key, None) or LoadTimes(adapter.key)
        try:
            image = await self._images.stage(adapter, lora_id, move.urgent, times)
        except (LoraCacheError, ArenaFullError, WorkerError) as error:
            raise TransitionFailedError(
                self._error(error, f"{adapter.key} could not be brought in", adapter.key)
            ) from error
        if move.to is not Tier.GPU:
            if move.urgent:
                self._begun[adapter.key] = times
            return
        slot, victim = self._place(move)
        try:
            await self._activate(adapter, image, slot, victim, times)
        except WorkerError as error:
            if victim is not None:
                demoted.append(victim)
            await self._give_up(slot, adapter.key, victim)
            if fresh:
                await self._images.drop([adapter.key], again=True)
            raise TransitionFailedError(
                self._error(error, f"vLLM could not load {adapter.key}", adapter.key),
                demoted=demoted,
            ) from error
        finally:
            self._reserved.discard(slot)
        self._slots[slot] = adapter.key
        self.load_times.append(times)
        if victim is not None:
            demoted.append(victim)

    async def _activate(
        self,
        adapter: Adapter,
        image: Image,
        slot: int,
        victim: AdapterKey | None,
        times: LoadTimes,
    ) -> None:
        """Have every worker write the adapter into `slot`, and publish it."""
        displaces = 0 if victim is None else self._id_of(victim)

        def load(op: int, worker: int) -> wire.ToAgent:
            if (room := image.room) is None:
                return wire.LoadNative(op, image.lora_id, slot, str(adapter.path), displaces)
            where = room.offsets[worker], room.nbytes[worker], image.contents[worker]
            return wire.Load(op, image.lora_id, slot, *where, displaces)

        began = time.perf_counter()
        answers = await self._workers.command(load)
        times.commanded = time.perf_counter() - began
        done = [answer for answer in answers if isinstance(answer, wire.Done)]
        times.handled = max(answer.seconds for answer in done)
        times.waited = max(answer.waited for answer in done)
        times.copied = max(answer.copied for answer in done)
        times.scattered = max(answer.scattered for answer in done)

    def _place(self, move: Transition) -> tuple[int, AdapterKey | None]:
        """The slot to write, and who leaves it: a victim, or nobody.

        If a worker has given a victim's slot to a request without a lease: the slot of such a one.
        """
        held = self._slots
        candidates = [
            *(slot for victim in move.demote for slot, key in held.items() if key == victim),
            *(slot for slot in range(self._capabilities.slots) if slot not in held),
            *(slot for slot, key in held.items() if _is_foreign(key)),
        ]
        for slot in candidates:
            if slot not in self._reserved:
                self._reserved.add(slot)
                return slot, held.get(slot)
        raise TransitionFailedError(
            EngineError("the slots are not as the cache believes: call reconcile()")
        )

    async def _give_up(self, slot: int, key: AdapterKey, victim: AdapterKey | None) -> None:
        """A load failed, on some worker at least: have the slot empty on all of them."""
        self._slots.pop(slot, None)
        ids = [self._id_of(each) for each in (key, victim) if each is not None]
        try:
            await self._workers.command(lambda op, _: wire.Unload(op, ids))
        except WorkerError:
            logger.exception("slot %d could not be emptied: call reconcile()", slot)

    async def _empty(self, keys: list[AdapterKey]) -> None:
        ids = [self._id_of(key) for key in keys if key in self._slots.values() or _is_foreign(key)]
        if ids:
            await self._workers.command(lambda op, _: wire.Unload(op, ids))
            self._slots = {slot: key for slot, key in self._slots.items() if key not in keys}

    # ------------------------------------------------------------------ questions

    def charge(self, adapter: Adapter) -> int:
        image = self._images.get(adapter.key) if self._images else None
        if image is not None and image.nbytes is not None:
            return image.nbytes
        return self._charges.of(adapter.manifest) if self._charges else super().charge(adapter)

    async def holdings(self) -> Holdings:
        if not self._workers.all:
            if self._lost:
                raise self._error(WorkerLostError("the worker has died"), "vLLM did not answer")
            return Holdings({}, frozenset())
        try:
            answers = await self._workers.command(lambda op, _: wire.Report(op))
        except WorkerError as error:
            raise self._error(error, "vLLM did not answer") from error
        reports = [answer for answer in answers if isinstance(answer, wire.Holding)]
        tables = [report.slots for report in reports]
        # A slot counts only if all tensor-parallel workers hold the same in it.
        self._slots = {
            slot: self._key_of(ids[0])
            for slot, ids in enumerate(zip(*tables, strict=True))
            if ids[0] and len(set(ids)) == 1
        }
        # Dropping what a request uses is useless: the next step would load it again, and wait for
        # it.  So of strangers that are running nothing is said until they have ended.
        recent = {lora_id for report in reports for lora_id in report.recent}
        slots = {
            slot: key
            for slot, key in self._slots.items()
            if not (_is_foreign(key) and self._id_of(key) in recent)
        }
        if len(slots) < len(self._slots):
            self._drifted()  # look again
        return Holdings(slots, frozenset(self._images or ()) | set(slots.values()))

    @property
    def unpacked(self) -> int:
        """How many adapters only vLLM's own loader could load, which is slower."""
        return self._images.unpacked if self._images else 0

    def slots(self) -> dict[int, AdapterKey]:
        return dict(self._slots)

    def watch(self, drifted: Callable[[], None]) -> None:
        self._drifted = drifted

    def conserve(self, is_scarce: bool) -> None:
        if self._images is not None:
            self._images.conserve(is_scarce)

    def begin_use(self, key: AdapterKey) -> None:
        pass  # nothing here depends on who is used

    def end_use(self, key: AdapterKey) -> None:
        pass

    async def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        request = self._requests[key] if key is not None else None
        stream = self._client.generate(prompt, params, request_id, request, **options)
        async with aclosing(stream):
            async for output in stream:
                yield output

    # ------------------------------------------------------------------ what workers tell unasked

    def _on_displaced(self, rank: int, event: wire.Displaced) -> None:
        if rank:  # every worker of a tensor-parallel group says so
            return
        self.displaced += 1
        if event.new_id:
            logger.warning(
                "what no lease had announced came into slot %d, and held up vLLM for %.3f s",
                event.slot, event.seconds,
            )  # fmt: skip
            self._slots[event.slot] = self._key_of(event.new_id)
        else:
            logger.warning("vLLM dropped what was in slot %d", event.slot)
            self._slots.pop(event.slot, None)
        self._drifted()

    def _on_lost(self) -> None:
        self._lost = True
        logger.error("a worker of vLLM has died, or gave its slots back")

    def _error(
        self, error: BaseException, what: str, key: AdapterKey | None = None
    ) -> LoraCacheError:
        if isinstance(error, WorkerLostError) or self._lost:
            return EngineDeadError(f"{what}: the engine has died; build a new engine and cache")
        return self._map(error, what, key)


def _is_foreign(key: AdapterKey) -> bool:
    return key.digest.startswith(FOREIGN)


def _read_capabilities(config: Any) -> Capabilities:
    lora = config.lora_config
    return Capabilities(
        name="resident",
        max_loras=int(lora.max_loras),
        max_cpu_loras=int(lora.max_cpu_loras),
        slots=int(lora.max_loras),
        host_entries=int(lora.max_cpu_loras),
        max_rank=int(lora.max_lora_rank),
        stages_without_slot=True,
        max_in_flight=None,
        max_speculative=_SPECULATIVE,
        tensor_parallel=int(config.parallel_config.tensor_parallel_size),
        widths=widths_of(config.model_config),
    )
