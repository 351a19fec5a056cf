"""Which steps of the engine have finished on the device.

vLLM launches a step in two calls, `execute_model` and `sample_tokens` (or `pool`), both of which
read LoRA slots, and with asynchronous scheduling returns long before the device is done.  The
clock counts the steps and records one event behind the last launch of each; whoever wants to
overwrite what a step reads waits for its event.  After the last step the event is already there,
so an idle engine needs no special case.

On a CPU a step is over when the call returns, and no events are needed.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from lora_cache.engines.resident.table import StoppedError

#: Waiting for a step that is older waits for the oldest of these instead: more than are in flight.
_KEPT_EVENTS = 8

_POLL_S = 0.05


class StepClock:
    """Counts steps.  `begin`, `end` and `start` are the step thread's; `wait` is anybody's.

    Args:
        record: records an event on the stream on which steps run, and returns a function that
            waits for it; none where steps are synchronous.
    """

    def __init__(self, record: Callable[[], Callable[[], None]] | None = None) -> None:
        self._record = record
        self._launched = threading.Condition()
        self._events: deque[tuple[int, Callable[[], None]]] = deque(maxlen=_KEPT_EVENTS)
        self._current = 0
        self._last_launched = 0
        self._recording = False

    @property
    def current(self) -> int:
        """The number of the step that is being launched, or was launched last."""
        return self._current

    def start(self) -> None:
        """Record events from now on.  Between steps only."""
        self._recording = True
        self._close_step()

    def stop(self) -> None:
        """Record none: nobody is going to wait."""
        self._recording = False
        self._events.clear()

    def begin(self) -> None:
        if self._last_launched < self._current:
            # A step that nobody sampled, such as a dummy run.  Its launches precede this event.
            self._close_step()
        with self._launched:
            self._current += 1

    def end(self) -> None:
        """All launches of the step have been made, or it failed."""
        if self._last_launched < self._current:
            self._close_step()

    def _close_step(self) -> None:
        event = self._record() if self._recording and self._record else None
        with self._launched:
            if event is not None:
                self._events.append((self._current, event))
            self._last_launched = self._current
            self._launched.notify_all()

    def wait(self, step: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until `step` has finished on the device.

        Raises:
            StoppedError: `stopped` says so, before it was launched.
        """
        with self._launched:
            while self._last_launched < step:
                if stopped():
                    raise StoppedError
                self._launched.wait(_POLL_S)
            event = next((event for number, event in self._events if number >= step), None)
        if event is not None:
            event()


def watch(runner: Any, clock: StepClock) -> None:
    """Have `clock` count the steps of a model runner, V1 or V2.

    The methods are replaced on the object, not on its class: other runners stay as they are.
    """
    execute = runner.execute_model

    @functools.wraps(execute)
    def execute_model(*args: Any, **kwargs: Any) -> Any:
        clock.begin()
        try:
            output = execute(*args, **kwargs)
        except BaseException:
            clock.end()
            raise
        if output is not None:  # nothing is sampled after it
            clock.end()
        return output

    def ending(launch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launch)
        def launched(*args: Any, **kwargs: Any) -> Any:
            try:
                return launch(*args, **kwargs)
            finally:
                clock.end()

        return launched

    runner.execute_model = execute_model
    for name in ("sample_tokens", "pool"):
        if hasattr(runner, name):
            setattr(runner, name, ending(getattr(runner, name)))
