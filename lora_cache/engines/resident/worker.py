"""vLLM's worker-side LoRA manager, with slots that lora_cache may take over.

Until an agent is attached, this is vLLM's own manager in every respect.  Attaching goes through
vLLM's public ``add_lora``, which reaches every worker in order with its steps: a LoRARequest of the
name `ATTACH` whose path is a Unix socket.  While attached:

* the agent decides what is in the slots; vLLM's two LRU caches are empty and evict nothing;
* a batch whose adapter is in no slot is served all the same: vLLM loads it on the step loop, as it
  always did, into a slot that the batch does not need, and the manager is told (`Displaced`);
* ``add_lora`` of somebody else takes a free slot or is refused; ``remove_lora`` frees the slot of
  what came that way, or unleased, and of nothing else; ``pin_lora`` and ``load_inplace`` are
  refused; ``list_loras`` lists the slots;
* dummy batches leave the slots alone; where vLLM drops all adapters because the base model's
  weights were replaced, so do we, and the manager is told.

When the manager dies or detaches, all slots are dropped and vLLM's own handling returns.

Everything here runs on vLLM's step thread.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from lora_cache.engines.resident import compat
from lora_cache.engines.resident.agent import Agent
from lora_cache.engines.resident.describe import describe
from lora_cache.engines.resident.images import Parts
from lora_cache.engines.resident.native import load_native, write_native
from lora_cache.engines.resident.slots import SlotWriter
from lora_cache.engines.resident.steps import StepClock, watch
from lora_cache.engines.resident.table import Hold, SlotTakenError, as_index
from lora_cache.engines.resident.wire import ATTACH, DETACH, Channel, Displaced, Hello

logger = logging.getLogger(__name__)


def parts_of(worker_manager: Any) -> Parts:
    """How the slots of this worker are laid out, and what writes into them."""
    manager, device = worker_manager._adapter_manager, worker_manager.device
    layout = describe(manager)

    def read(lora_id: int, path: str) -> Any:
        request = LoRARequest(lora_name=f"native {lora_id}", lora_int_id=lora_id, lora_path=path)
        return load_native(worker_manager, request)

    return Parts(
        SlotWriter(manager, layout),
        msgspec.msgpack.encode(layout),
        nbytes := layout.max_nbytes(layout.max_rank),
        read,
        partial(write_native, manager),
        torch.empty(nbytes, dtype=torch.uint8, device=device) if device.type == "cuda" else None,
    )


class ResidentLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """See the module.  `unleased` counts the loads on the step loop since vLLM started."""

    #: Replaced by tests.
    parts_of: Callable[[Any], Parts] = staticmethod(parts_of)

    def __init__(self, vllm_config: Any, device: torch.device, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, device, *args, **kwargs)
        self._clock = StepClock(_record if device.type == "cuda" else None)
        self._agent: Agent | None = None
        self._parts: Parts | None = None
        self._dummies: set[int] = set()
        self._foreign: set[int] = set()  # what was loaded on the step loop, and may be removed
        self.unleased = 0

    def watch(self, runner: Any) -> None:
        """Count the steps of the model runner; once, when it loads its model."""
        watch(runner, self._clock)
        if self.device.type == "cuda":
            self._warm_up()

    def _warm_up(self) -> None:
        """Take memory before vLLM sizes its KV cache, and compile before a request waits for it."""
        try:
            self._parts = self.parts_of(self)
            self._parts.writer.clear(0)
        except Exception:
            # Nobody may ever attach; who does is told why it fails.
            logger.exception("the slots of this model are unknown to lora_cache")
            self._parts = None

    @property
    def attached(self) -> Agent | None:
        """The agent in charge.  One that has ended is cleared away first."""
        if self._agent is not None and self._agent.lost:
            if not self._agent.dismissed:
                logger.warning("lora_cache is gone: its slots are dropped, vLLM manages them again")
            self._give_back()
        return self._agent

    # --- attach, detach ------------------------------------------------------------------

    def _attach(self, path: str) -> bool:
        if self.attached is not None:
            raise RuntimeError("this engine already has a manager: close the other one first")
        _check_private(path)
        manager = self._adapter_manager
        parts = self._parts or self.parts_of(self)
        rank, world_size = compat.tensor_parallel()
        hello = Hello(
            rank=rank,
            world_size=world_size,
            pid=os.getpid(),
            device=str(self.device),
            max_loras=manager.lora_slots,
            layout=parts.layout,
            image_bytes=parts.image_bytes,
        )
        agent = Agent(Channel.connect(path), hello, self._clock, parts, self.device)
        # From here on nothing fails.  Steps in flight may still read any slot.
        manager.remove_all_adapters()
        agent.table.used(self._clock.current)
        self._clock.start()
        self._agent = agent
        agent.start()
        return True

    def _give_back(self) -> None:
        agent, self._agent = self._agent, None
        if agent is None:
            return
        agent.stop()
        self._clock.stop()
        self._dummies.clear()
        self._foreign.clear()
        self._adapter_manager.remove_all_adapters()

    # --- batches -------------------------------------------------------------------------

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        agent = self.attached
        if agent is None:
            super().set_active_adapters(requests, mapping)
            return
        manager = self._adapter_manager
        batch = {request.lora_int_id: request for request in requests if request}
        if self._dummies and batch.keys() <= self._dummies:
            # What a dummy batch computes is thrown away: any weights will do.
            manager.lora_index_to_id = list(range(1, manager.lora_slots + 1))
            if mapping is not None:
                manager.set_adapter_mapping(mapping)
            return
        self._dummies.clear()
        if len(batch) > manager.lora_slots:
            raise RuntimeError(
                f"the batch needs {len(batch)} LoRAs, and there are {manager.lora_slots} slots"
            )
        table = agent.table
        try:
            while missing := table.prepare(batch, self._clock.current):
                self._bring_unleased(agent, batch[missing[0]])
            manager.lora_index_to_id = as_index(table.ids())
            if mapping is not None:
                manager.set_adapter_mapping(mapping)
        finally:
            table.prepared()

    def _bring_unleased(self, agent: Agent, request: Any) -> None:
        """Load what a batch needs and nobody has brought in."""
        began = time.perf_counter()
        with compat.synchronising():
            model = load_native(self, request)  # before anything is displaced for it
            hold = agent.table.reserve(self._clock.current)
            if hold is None:
                raise RuntimeError("no slot is left for a batch that fits the slots")
            self._fill(agent, hold, model, began)
        self.unleased += 1
        logger.warning(
            "%s was used without a lease: it was loaded on the step loop, in %.0f ms",
            request.lora_name,
            (time.perf_counter() - began) * 1e3,
        )

    def _fill(self, agent: Agent, hold: Hold, model: Any, began: float) -> None:
        """Write a loaded adapter into a held slot, publish it and report it."""
        now_in_it = 0
        try:
            write_native(self._adapter_manager, hold.slot, model)
        except BaseException:
            agent.table.release(hold)
            raise
        else:
            try:
                agent.table.publish(hold, model.id)
                self._foreign.add(model.id)
                now_in_it = model.id
            except SlotTakenError:
                logger.info("the agent brought LoRA %d in at the same time", model.id)
        finally:
            seconds = time.perf_counter() - began
            if now_in_it or hold.old_id:
                agent.tell(Displaced(hold.slot, hold.old_id, now_in_it, seconds))

    # --- vLLM's API ----------------------------------------------------------------------

    def add_adapter(self, lora_request: Any) -> bool:
        if lora_request.lora_name == ATTACH:
            return self._attach(lora_request.lora_path)
        if lora_request.lora_name == DETACH:
            self._give_back()
            return True
        agent = self.attached
        if agent is None:
            return bool(super().add_adapter(lora_request))
        if getattr(lora_request, "load_inplace", False):
            raise ValueError("lora_cache manages the slots: load a new version under a new id")
        if lora_request.lora_int_id in agent.table.ids():
            return True
        began = time.perf_counter()
        # Like a step, it launches what the agent has to wait for.
        self._clock.begin()
        try:
            with compat.synchronising():
                model = load_native(self, lora_request)
                hold = agent.table.reserve_free(self._clock.current)
                if hold is None:
                    raise RuntimeError("lora_cache manages the slots, and none is free")
                self._fill(agent, hold, model, began)
        finally:
            self._clock.end()
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        agent = self.attached
        if agent is None:
            return bool(super().remove_adapter(adapter_id))
        if adapter_id in agent.table.ids() and adapter_id not in self._foreign:
            # Running requests would reload it from disk, on the step loop, or die with it.
            raise ValueError("lora_cache manages the slots: unload with lora_cache")
        return bool(self._drop(agent, [adapter_id]))

    def remove_all_adapters(self) -> None:
        agent = self.attached
        if agent is None:
            super().remove_all_adapters()
        elif self._dummies:
            self._dummies.clear()  # the end of a dummy batch; the next real one sets the index
        else:
            self._drop(agent, agent.table.ids())

    def _drop(self, agent: Agent, lora_ids: list[int]) -> list[tuple[int, int]]:
        gone = agent.table.unpublish(lora_ids)
        for slot, lora_id in gone:
            agent.tell(Displaced(slot, lora_id, 0, 0.0))
        return gone

    def pin_adapter(self, adapter_id: int) -> bool:
        if self.attached is None:
            return bool(super().pin_adapter(adapter_id))
        raise ValueError("lora_cache manages the slots: pin with lora_cache")

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        if self.attached is None:
            return bool(super().add_dummy_lora(lora_request, rank))
        self._dummies.add(lora_request.lora_int_id)
        return False

    def list_adapters(self) -> set[int]:
        agent = self.attached
        if agent is None:
            return set(super().list_adapters())
        return {lora_id for lora_id in agent.table.ids() if lora_id}


def _record() -> Callable[[], None]:
    event = torch.cuda.Event(blocking=True)
    event.record()
    wait: Callable[[], None] = event.synchronize
    return wait


def _check_private(path: str) -> None:
    """A socket that others could have made may not command this worker."""
    found = os.stat(os.path.dirname(path))
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{os.path.dirname(path)} must be yours alone (mode 0700)")
