"""The thread in each vLLM worker that fills slots while the step loop runs.

It takes one message of the manager after the other.  The table (`table.py`) says which slots it may
have, the clock (`steps.py`) when they may be overwritten.  It ends when the manager does, when it
is told to, or when it fails; `lost` is true from then on, and nothing of it is left.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from lora_cache.engines.resident.images import ImageWriter, Parts, Written
from lora_cache.engines.resident.steps import StepClock
from lora_cache.engines.resident.table import SlotTable, SlotTakenError, StoppedError
from lora_cache.engines.resident.wire import (
    Bye,
    Channel,
    Displaced,
    Done,
    Failed,
    Hello,
    Holding,
    Load,
    LoadNative,
    Message,
    PageLock,
    PageUnlock,
    Report,
    Unload,
    Welcome,
    WireError,
)

logger = logging.getLogger(__name__)

#: A batch may call a slot back for a row of a finished request, and again for the next.
_ATTEMPTS = 5
#: What no batch has needed for so long no request is using: longer than almost any step.
_RECENTLY_S = 1.0


class Agent:
    """Serves one manager.

    Args:
        channel: connected; the agent's thread closes it.
        hello: what it says first.
        clock: of the model runner.
        parts: what writes into slots.
        device: where the slots are.

    `start`, `stop` and `tell` are called by the step thread; `lost` and `table` are thread-safe.
    """

    def __init__(
        self,
        channel: Channel,
        hello: Hello,
        clock: StepClock,
        parts: Parts,
        device: torch.device,
    ) -> None:
        self._channel = channel
        self._hello = hello
        self._clock = clock
        self._parts = parts
        self._device = device
        self._stop = threading.Event()
        self._lost = threading.Event()
        #: Whether the manager said good-bye.
        self.dismissed = False
        self.table = SlotTable(hello.max_loras, self._stop.is_set)
        self._native: dict[int, Any] = {}  # what vLLM's loader made, by id
        self._outbox: deque[Displaced | Done | Failed] = deque()
        # Page-locking takes long, and loads are not to wait for it.
        self._locking = ThreadPoolExecutor(1, "lora-cache-page-locks")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()  # `select` takes no descriptor above 1023
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(channel.fileno(), select.POLLIN)
        # A daemon, lest an engine that is never detached keep its process from ending.
        self._thread = threading.Thread(target=self._run, name="lora-cache-agent", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether the agent has ended."""
        return self._lost.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the agent, and wait until it has: a write that it has begun it completes."""
        self._stop.set()
        if not self.lost:
            self._channel.shut_down()
        if self._thread.ident is not None:
            self._thread.join()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def tell(self, change: Displaced) -> None:
        """Report what happened to a slot; never waits for the manager."""
        self._send_later(change)

    def _send_later(self, message: Displaced | Done | Failed) -> None:
        self._outbox.append(message)
        os.eventfd_write(self._wake, 1)

    # --- the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        images: ImageWriter | None = None
        try:
            self._channel.send(self._hello)
            welcome = self._channel.receive()
            if not isinstance(welcome, Welcome):
                raise WireError(f"{type(welcome).__name__} came before Welcome")
            images = ImageWriter(welcome.arena_path, welcome.arena_bytes, self._parts, self._device)
            while True:
                message = self._next()
                if isinstance(message, Bye):
                    self.dismissed = True
                    break
                self._handle(message, images)
        except (EOFError, OSError, StoppedError) as error:
            level = logging.INFO if self._stop.is_set() else logging.WARNING
            logger.log(level, "the connection to lora_cache ended: %s", error or "stopped")
        except Exception:
            # vLLM must not go down with it; the step thread sees `lost` and takes the slots back.
            logger.exception("the agent of lora_cache failed; vLLM manages its slots itself again")
        finally:
            self._locking.shutdown(cancel_futures=True)
            if images is not None:
                images.close()
            self._channel.shut_down()
            self._channel.close()
            self._lost.set()

    def _next(self) -> Message:
        """The next message; changes are reported meanwhile."""
        while True:
            self._report_changes()
            if self._channel.has_message:
                return self._channel.receive()
            ready = {descriptor for descriptor, _ in self._poll.poll()}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._channel.fileno() in ready:
                return self._channel.receive()

    def _report_changes(self) -> None:
        while self._outbox:
            self._channel.send(self._outbox.popleft())

    def _answer(self, answer: Done | Failed | Holding) -> None:
        self._report_changes()  # in the order in which things happened
        self._channel.send(answer)

    def _handle(self, message: Message, images: ImageWriter) -> None:
        began = time.perf_counter()
        if isinstance(message, Report):
            recent = self.table.recent(_RECENTLY_S)
            self._answer(Holding(message.op, self.table.ids(), list(self._native), recent))
        elif isinstance(message, Unload):
            self.table.unpublish(message.lora_ids)
            if message.forget:
                for lora_id in message.lora_ids:
                    self._native.pop(lora_id, None)
            self._answer(Done(message.op, time.perf_counter() - began))
        elif isinstance(message, PageLock | PageUnlock):
            self._locking.submit(self._page_lock, message, images)
        elif isinstance(message, Load | LoadNative):
            try:
                waited, written = self._load(message, images)
            except (EOFError, OSError, StoppedError):
                raise
            except SlotTakenError as error:
                self._answer(Failed(message.op, str(error)))
            except Exception as error:
                logger.exception(
                    "loading LoRA %d into slot %d failed", message.lora_id, message.slot
                )
                self._answer(Failed(message.op, f"{type(error).__name__}: {error}"))
            else:
                self._answer(Done(message.op, time.perf_counter() - began, waited, *written))
        else:
            raise WireError(f"a {type(message).__name__} is not for an agent")

    def _page_lock(self, message: PageLock | PageUnlock, images: ImageWriter) -> None:
        began = time.perf_counter()
        try:
            if isinstance(message, PageLock):
                images.lock(message.offset, message.nbytes)
            else:
                for offset in message.offsets:
                    images.unlock(offset)
        except Exception as error:
            logger.exception("page-locking an image failed")
            self._send_later(Failed(message.op, f"{type(error).__name__}: {error}"))
        else:
            self._send_later(Done(message.op, time.perf_counter() - began))

    def _load(self, load: Load | LoadNative, images: ImageWriter) -> tuple[float, Written]:
        write: Callable[[], Written]
        if isinstance(load, LoadNative):
            if load.lora_id not in self._native:
                self._native[load.lora_id] = self._parts.read_native(load.lora_id, load.path)
            model = self._native[load.lora_id]
            if load.slot < 0:
                return 0.0, Written()
            write = partial(images.write_native, load.slot, model)
        else:
            write = partial(images.write, load.slot, load.offset, load.nbytes, load.contents)
        if load.lora_id in self.table.ids():
            raise SlotTakenError(f"{load.lora_id} is published already")
        hold = None
        began = time.perf_counter()
        for _ in range(_ATTEMPTS):
            hold = self.table.take(load.slot, load.displaces)
            try:
                self._clock.wait(hold.last_used_step, self._stop.is_set)
            except StoppedError:
                self.table.release(hold)
                raise
            if self.table.begin_writing(hold):
                break
        else:
            raise SlotTakenError(f"running requests need {load.displaces} in slot {load.slot}")
        waited = time.perf_counter() - began
        try:
            written = write()
        except BaseException:
            self.table.release(hold)
            raise
        self.table.publish(hold, load.lora_id)
        return waited, written
