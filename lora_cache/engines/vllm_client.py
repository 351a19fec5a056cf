"""The few calls into vLLM that engines need, for `AsyncLLM` and for `LLM` alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from lora_cache.errors import ConfigError, EngineDeadError, EngineError, RequestRefusedError
from lora_cache.waiting import until_done

_T = TypeVar("_T")

#: Rounds of the event loop without news after which no hand-over is under way (one takes six).
_QUIET_ROUNDS = 12
#: An application on the same loop may keep it busy for ever; the engine is stepped all the same.
_MOST_ROUNDS = 400


class VllmClient(Protocol):
    """vLLM as engines see it.

    Exceptions of vLLM pass through `add_lora`, `remove_lora` and `list_loras` as they are;
    `is_dead` tells whether the engine survived.  `generate` maps them.
    """

    @property
    def vllm_config(self) -> Any: ...

    @property
    def is_dead(self) -> bool: ...

    async def add_lora(self, request: Any) -> None: ...

    async def remove_lora(self, lora_int_id: int) -> None: ...

    async def list_loras(self) -> set[int]: ...

    def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: Any, **options: Any
    ) -> AsyncGenerator[Any, None]: ...

    async def close(self) -> None:
        """Wait for the requests, and end the threads; it may be used again all the same."""


class AsyncClient:
    """`vllm.AsyncLLM`.  Calls from one event loop reach the engine in the order they are made."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    @property
    def vllm_config(self) -> Any:
        return self._llm.vllm_config

    @property
    def is_dead(self) -> bool:
        return bool(self._llm.errored)

    async def add_lora(self, request: Any) -> None:
        await self._llm.add_lora(request)

    async def remove_lora(self, lora_int_id: int) -> None:
        await self._llm.remove_lora(lora_int_id)

    async def list_loras(self) -> set[int]:
        return set(await self._llm.list_loras())

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: Any, **options: Any
    ) -> AsyncGenerator[Any, None]:
        stream = self._llm.generate(
            prompt, params, request_id, lora_request=lora_request, **options
        )
        try:
            # Closing vLLM's generator sends the abort before it returns.
            async with aclosing(stream):
                async for output in stream:
                    yield output
            # A stop string ends a request here before vLLM has sent the abort to its engine; its
            # output task does so before it is scheduled twice more.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except Exception as error:  # vLLM raises what its layers raise; nothing of it may leak
            raise _request_error(error, dead=self.is_dead) from error

    async def close(self) -> None:
        pass


class SyncClient:
    """`vllm.LLM`, on a thread of its own, stepped there while there are requests.

    `LLM` is not thread-safe: that thread makes every call, in the order in which they are asked
    for.  So the event loop is free while vLLM computes: what moves adapters runs on it, and would
    otherwise wait for a step with each message.
    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._thread: ThreadPoolExecutor | None = None
        self._calls: set[asyncio.Future[Any]] = set()  # asked for, not done
        self._streams: dict[str, asyncio.Queue[Any]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._news = 0  # counts adapters and requests that came or went

    @property
    def vllm_config(self) -> Any:
        return self._engine.vllm_config

    @property
    def is_dead(self) -> bool:
        return self._failure is not None

    async def add_lora(self, request: Any) -> None:
        self._news += 1
        await self._call(self._engine.add_lora, request)

    async def remove_lora(self, lora_int_id: int) -> None:
        self._news += 1
        await self._call(self._engine.remove_lora, lora_int_id)

    async def list_loras(self) -> set[int]:
        return set(await self._call(self._engine.list_loras))

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: Any, **options: Any
    ) -> AsyncGenerator[Any, None]:
        if self._failure is not None:
            raise _request_error(self._failure, dead=True) from self._failure
        outputs: asyncio.Queue[Any] = asyncio.Queue()

        def add() -> None:  # on vLLM's thread: a step finds all streams of what it computes
            self._engine.add_request(
                request_id, prompt, params, lora_request=lora_request, **options
            )
            self._streams[request_id] = outputs

        self._news += 1
        finished = False
        try:
            try:
                await self._call(add)
            except Exception as error:  # vLLM raises what its layers raise; nothing may leak
                raise _request_error(error, dead=False) from error
            if self._failure is not None:  # a step before it failed meanwhile
                raise _request_error(self._failure, dead=True) from self._failure
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step(), name="vllm-step")
            while not finished:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise _request_error(output, dead=True) from output
                finished = output.finished
                yield output
        finally:
            added = self._streams.pop(request_id, None) is not None
            if added and not finished and self._failure is None:
                await self._call(self._engine.abort_request, [request_id])

    async def close(self) -> None:
        if self._stepping is not None:
            await asyncio.wait([self._stepping])
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    async def _call(self, function: Callable[..., _T], *args: Any, **options: Any) -> _T:
        """Make a call on vLLM's thread.  It cannot be taken back: one who is cancelled waits."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "lora-cache-vllm", _same_device())
        call = asyncio.get_running_loop().run_in_executor(
            self._thread, partial(function, *args, **options)
        )
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            await until_done(call)
        except asyncio.CancelledError:
            call.exception()  # nobody is left to be told
            raise
        return call.result()

    async def _step(self) -> None:
        await self._quiet()
        while self._streams:
            try:
                outputs = await self._call(self._engine.step)
            except Exception as error:  # an exception in a step leaves vLLM unusable
                self._failure = error
                for stream in list(self._streams.values()):  # a call may be adding one
                    stream.put_nowait(error)
                return
            for output in outputs:
                if output.request_id in self._streams:
                    self._streams[output.request_id].put_nowait(output)
            if any(output.finished for output in outputs):
                await self._quiet()
            else:
                await asyncio.sleep(0)

    async def _quiet(self) -> None:
        """Let hand-overs end, so that all who can join the next step do.

        What the end of a request sets in motion (its lease ends, the next adapter is loaded,
        whoever waited for it sends its requests) takes several rounds of the loop.  Stepping
        meanwhile costs half-empty steps, and several small prefills in place of one, which takes
        as long as any of them.
        """
        seen, quiet = self._news, 0
        for _ in range(_MOST_ROUNDS):
            if self._calls:
                await asyncio.wait(self._calls)
                quiet = 0
                continue
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._news == seen else 0
            seen = self._news
            if quiet == _QUIET_ROUNDS:
                return


def connect(target: Any) -> VllmClient:
    """Wrap an `AsyncLLM` or an `LLM`.

    Raises:
        ConfigError: `target` is neither.
    """
    if hasattr(target, "llm_engine"):
        return SyncClient(target)
    if hasattr(target, "engine_core") and hasattr(target, "add_lora"):
        return AsyncClient(target)
    raise ConfigError(
        f"{type(target).__name__} is not an engine: give a vllm.AsyncLLM, a vllm.LLM, or an "
        "object of the lora_cache Engine protocol"
    )


def _same_device() -> Callable[[], None]:
    """Has a new thread use the GPU that this one uses, if it uses one."""
    import torch

    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _request_error(error: Exception, *, dead: bool) -> EngineError:
    if isinstance(error, EngineError):
        return error
    if dead:
        return EngineDeadError(f"vLLM's engine has died ({error}): build a new engine and cache")
    return RequestRefusedError(f"vLLM refused the request: {error}")
