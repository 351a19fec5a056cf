"""Calls that may be stuck in a network for a while, and that somebody may stop waiting for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def start(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Call it in a thread of its own, which holds up neither a pool nor the end of the process."""
    future: Future[_T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # whatever it was, somebody waits to hear of it
            future.set_exception(error)
        else:
            future.set_result(result)

    name = f"lora-cache-{getattr(function, '__name__', 'call')}"
    threading.Thread(target=run, name=name, daemon=True).start()
    return future
