"""The stock engine: any policy, enforced through vLLM's public API alone; nothing is patched.

vLLM has no "demote".  What it has: `add_lora` of a new adapter evicts from the slots whatever
was touched longest ago, and `add_lora` of a resident adapter only touches it.  Touching whatever
may be older than the planner's victim (`recency.py`) makes vLLM evict exactly that victim, which
stays in vLLM's CPU tier.  `remove_lora` drops an adapter from both tiers; it comes after the
newcomer's `add_lora` has succeeded, so a failing load costs nobody anything.  For that, one of
vLLM's `max_cpu_loras` places is kept free: host memory here holds ``max_cpu_loras - 1``.

`pin_lora` is never used: vLLM has no unpin, and one idle pin can kill its engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.engines.base import Capabilities, TransitionFailedError
from lora_cache.engines.managed import ManagedVllm
from lora_cache.engines.recency import SlotMirror
from lora_cache.engines.widths import widths_of
from lora_cache.errors import ConfigError, EngineDeadError
from lora_cache.planner import Holdings, Transition

logger = logging.getLogger(__name__)


class StockEngine(ManagedVllm):
    """vLLM as it is installed.

    Args:
        target: a `vllm.AsyncLLM` or a `vllm.LLM`, started with ``enable_lora=True`` and
            ``max_cpu_loras`` of at least ``max_loras + 1``.

    Raises:
        ConfigError: LoRA is off, or the topology is one that cannot be managed.
    """

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self._capabilities = _read_capabilities(self._client.vllm_config)
        self._mirror = SlotMirror(self._capabilities.max_loras)
        self._order = asyncio.Lock()  # one transition at a time, first come first served

    async def attach(self) -> None:
        self._claim()
        try:
            for lora_int_id in await self._client.list_loras():
                logger.warning("dropping LoRA %d, which was loaded before", lora_int_id)
                await self._client.remove_lora(lora_int_id)
        except Exception as error:
            self._disclaim()
            raise self._map(error, "vLLM did not answer") from error

    async def detach(self) -> None:
        if not self._disclaim():
            return
        if not self._client.is_dead:
            await self._give_back()
        await self._client.close()

    async def _give_back(self) -> None:
        async with self._order:
            try:
                for lora_int_id in await self._client.list_loras():
                    if lora_int_id in self._keys:
                        await self._client.remove_lora(lora_int_id)
            except Exception as error:
                raise self._map(error, "vLLM did not take its adapters back") from error

    async def apply(self, move: Transition, adapter: Adapter | None) -> None:
        async with self._order:
            if adapter is not None:
                await self._load(move, adapter)
            gone: list[AdapterKey] = []
            try:
                for key in move.drop:
                    await self._client.remove_lora(self._id_of(key))
                    self._mirror.removed(key)
                    gone.append(key)
            except Exception as error:
                # The newcomer is dropped by the next reconcile: the planner knows it as failed.
                raise TransitionFailedError(
                    self._map(error, f"vLLM did not drop {key}"), demoted=move.demote, dropped=gone
                ) from error

    async def _load(self, move: Transition, adapter: Adapter) -> None:
        request = self._request_for(adapter)
        # vLLM evicts one slot if all are taken.  Further demotions are adapters that leave host
        # memory too, and leave their slots with that.
        victim = move.demote[0] if move.demote and self._mirror.is_full else None
        touch = self._mirror.older_than(victim) if victim else []
        sent = self._mirror.event()
        outcomes = await asyncio.gather(
            *(self._client.add_lora(self._requests[key]) for key in touch),
            self._client.add_lora(request),
            return_exceptions=True,
        )
        for key, touched in zip(touch, outcomes, strict=False):
            if not isinstance(touched, BaseException):
                self._mirror.touched(key, sent)
        # The newcomer's own failure explains most; a touch that failed spoils the order, too.
        for outcome in reversed(outcomes):
            if isinstance(outcome, BaseException):
                await self._roll_forward(adapter.key, victim, outcome)
        self._mirror.activated(adapter.key, victim, sent)

    async def _roll_forward(
        self, key: AdapterKey, victim: AdapterKey | None, cause: BaseException
    ) -> None:
        """A load failed: find out how far it got, clear the remains, and report."""
        demoted: list[AdapterKey] = []
        error = self._map(cause, f"vLLM could not load {key}", key)
        try:
            if not isinstance(error, EngineDeadError):
                lora_int_id = self._id_of(key)
                if lora_int_id in await self._client.list_loras():
                    # It was read and registered, and writing it into the slot failed: by then
                    # vLLM had evicted.
                    await self._client.remove_lora(lora_int_id)
                    if victim is not None:
                        self._mirror.removed(victim)
                        demoted.append(victim)
        except Exception as again:
            error = self._map(again, f"vLLM could not load {key}", key)
        raise TransitionFailedError(error, demoted=demoted) from cause

    async def holdings(self) -> Holdings:
        async with self._order:
            try:
                held = await self._client.list_loras()
            except Exception as error:
                raise self._map(error, "vLLM did not answer") from error
            host = frozenset(map(self._key_of, held))
            # vLLM does not tell what is in the slots: what the commands imply, as far as it is
            # still in host memory.
            for key in set(self._mirror.slots().values()) - host:
                self._mirror.removed(key)
            return Holdings(self._mirror.slots(), host)

    def slots(self) -> dict[int, AdapterKey]:
        return self._mirror.slots()

    def watch(self, drifted: Callable[[], None]) -> None:
        pass  # vLLM tells nothing unasked

    def conserve(self, is_scarce: bool) -> None:
        pass  # nothing is held but adapters

    def begin_use(self, key: AdapterKey) -> None:
        self._mirror.begin_use(key)

    def end_use(self, key: AdapterKey) -> None:
        self._mirror.end_use(key)

    async def generate(
        self, prompt: Any, params: Any, *, request_id: str, key: AdapterKey | None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        sent = self._mirror.event()
        request = self._requests[key] if key is not None else None
        stream = self._client.generate(prompt, params, request_id, request, **options)
        async with aclosing(stream):
            async for output in stream:
                if key is not None:
                    self._mirror.ran(key, sent)
                yield output


def _read_capabilities(config: Any) -> Capabilities:
    """What this vLLM can hold."""
    lora = config.lora_config
    slots, places = int(lora.max_loras), int(lora.max_cpu_loras)
    if places < 2:
        raise ConfigError(
            f"max_cpu_loras={places} leaves no place to load into: set it to max_loras + 1 or more"
        )
    if places <= slots:
        logger.warning(
            "max_cpu_loras=%d with max_loras=%d: one place is kept free for loading, so only %d "
            "slots can be used; set max_cpu_loras to %d or more",
            places, slots, places - 1, slots + 1,
        )  # fmt: skip
    return Capabilities(
        name="stock",
        max_loras=slots,
        max_cpu_loras=places,
        slots=min(slots, places - 1),
        host_entries=places - 1,
        max_rank=int(lora.max_lora_rank),
        stages_without_slot=False,
        max_in_flight=1,
        max_speculative=1,
        tensor_parallel=int(config.parallel_config.tensor_parallel_size),
        widths=widths_of(config.model_config),
    )
