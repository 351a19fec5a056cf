"""A cache inside `vllm serve`: routes that a test asks (an entry point of the server's process)."""

from __future__ import annotations

from typing import Any

from lora_cache import AsyncLoraCache
from tests.real.test_stock_engine import greedy


class ManagerPlugin:
    """vLLM's endpoint plugin: it is given the server's engine client, and adds routes."""

    name = "manager"
    required_tasks = None

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self.client = engine_client

    def attach_router(self, app: Any) -> None:
        @app.post("/manager/attach")  # type: ignore[untyped-decorator]
        async def attach() -> str:
            cache = AsyncLoraCache(self.client, policy="lru", publish=False)
            await cache.__aenter__()
            self.cache = cache
            return cache.snapshot().engine

        @app.post("/manager/ask")  # type: ignore[untyped-decorator]
        async def ask(body: dict[str, Any]) -> list[int]:
            prompt = {"prompt_token_ids": body["prompt"]}
            params = greedy(body["max_tokens"])
            params.detokenize = False
            last: Any = None
            async for output in self.cache.generate(prompt, params, body["adapter"]):
                last = output
            return list(last.outputs[0].token_ids)

        @app.post("/manager/reconcile")  # type: ignore[untyped-decorator]
        async def reconcile() -> int:
            return await self.cache.reconcile()

        @app.post("/manager/detach")  # type: ignore[untyped-decorator]
        async def detach() -> dict[str, Any]:
            engine: Any = self.cache._engine
            await self.cache.close()
            return {**self.cache.stats().to_dict(), "displaced": engine.displaced}
