"""One request's outputs, read from the engine whether or not anybody listens.

The lease must end when the engine is done with the request: not earlier, when a consumer loses
interest, and not later, when one forgets the generator.  So a task of the request's own reads
the engine's stream, and owns the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from lora_cache.errors import CacheClosedError, EngineError, LoraCacheError
from lora_cache.lease import Lease
from lora_cache.waiting import until_done

_END = object()


class Feed:
    """Async iterator over the outputs of one request.

    Args:
        stream: the engine's generator; closing it aborts the request.
        lease: ends when the stream has ended.
    """

    def __init__(self, stream: AsyncGenerator[Any, None], lease: Lease | None) -> None:
        self._stream = stream
        self._lease = lease
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._read(), name="lora-cache-feed")

    def __aiter__(self) -> Feed:
        return self

    async def __anext__(self) -> Any:
        """Next output.

        Raises:
            EngineError: the request failed.
            CacheClosedError: the cache was closed under the request.
        """
        output = await self._outputs.get()
        if output is _END:
            raise StopAsyncIteration
        if isinstance(output, LoraCacheError):
            raise output
        return output

    async def close(self) -> None:
        """Abort the request, if it runs, and wait until that is done."""
        self._task.cancel()
        await until_done(self._task)

    async def _read(self) -> None:
        try:
            async with aclosing(self._stream) as stream:
                async for output in stream:
                    self._outputs.put_nowait(output)
        except asyncio.CancelledError:
            self._outputs.put_nowait(CacheClosedError("the request was aborted"))
            raise
        except LoraCacheError as error:
            self._outputs.put_nowait(error)
        except Exception as error:  # an engine that breaks its contract: still one clear error
            wrapped = EngineError(f"the engine failed: {error}")
            wrapped.__cause__ = error
            self._outputs.put_nowait(wrapped)
        finally:
            if self._lease is not None:
                self._lease.end()
            self._outputs.put_nowait(_END)
