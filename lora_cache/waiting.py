"""Waiting for what cannot be taken back."""

from __future__ import annotations

import asyncio
from typing import Any


async def until_done(future: asyncio.Future[Any]) -> None:
    """Wait until `future` is done, however often the caller is cancelled meanwhile.

    The future is not cancelled, and its outcome is not looked at.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the future is done all the same.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
