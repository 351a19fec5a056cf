"""Tokens and top log-probabilities are, bit for bit, those with natively loaded adapters.

Both run the same batches through vLLM's own `generate`; nothing but the way into the slot differs,
and the slot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cache import AsyncLoraCache
from tests.real.engines import ALIVE, engine_arguments, switched_on
from tests.real.test_stock_engine import prompt
from tests.resident.asking import SLOTS, request, runner_of, unleased
from tests.resident.scripted import slot_tensors
from tests.resident.test_engine import cache_of, run

pytestmark = pytest.mark.vllm

#: The five best tokens of each place with their log-probabilities and ranks, token by token.
Answer = list[list[tuple[int, float, int]]]


def ask(llm: Any, loras: list[Any]) -> list[Answer]:
    """Two prompts for each, all in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=5)
    prompts = [prompt(seed, 7) for seed in (0, 1) for _ in loras]
    outputs = llm.generate(prompts, params, lora_request=loras * 2, use_tqdm=False)
    answers = []
    for output in outputs:
        (found,) = output.outputs
        chosen = [next(iter(place)) for place in found.logprobs]
        assert chosen == list(found.token_ids), "the token that was taken comes first"
        answers.append(
            [[(t, p.logprob, p.rank) for t, p in place.items()] for place in found.logprobs]
        )
    return answers


@pytest.fixture(scope="module")
def bfloat16_llm(tiny_model: Path) -> Any:
    from vllm import LLM

    with switched_on():
        ALIVE.append(LLM(**engine_arguments(tiny_model, dtype="bfloat16")))
    return ALIVE[-1]


@pytest.fixture(params=["float32", "bfloat16"])
def engines(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The native one and ours: two engines, or one and the same before a cache attaches."""
    if request.param == "float32":
        return request.getfixturevalue("llm"), request.getfixturevalue("resident_llm")
    return (request.getfixturevalue("bfloat16_llm"),) * 2


@asynccontextmanager
async def in_slots(cache: AsyncLoraCache, batch: list[Path]) -> AsyncIterator[list[Any]]:
    """What requests carry for these adapters, brought in so that slots are not as natively."""
    async with AsyncExitStack() as stack:
        leases = [await stack.enter_async_context(cache.lease(path)) for path in reversed(batch)]
        yield [lease.request for lease in reversed(leases)]


def corrupt(llm: Any, lora: Any) -> None:
    """Change one number of the slot that `lora` is in."""
    manager = runner_of(llm).lora_manager._adapter_manager
    slot = runner_of(llm).lora_manager.attached.table.ids().index(lora.lora_int_id)
    with torch.inference_mode():
        next(t for t in slot_tensors(manager, slot) if t.any()).view(-1)[0] += 1


@pytest.mark.long
def test_every_token_and_log_probability_is_the_same(
    engines: tuple[Any, Any], adapters: list[Path]
) -> None:
    native, ours = engines
    batches = [adapters[first : first + SLOTS] for first in range(0, len(adapters), SLOTS)]
    expected = []
    for number, batch in enumerate(batches):
        loras = [request(10 * number + n, path) for n, path in enumerate(batch)]
        expected.append(ask(native, loras))
        runner_of(native).lora_manager.remove_all_adapters()
    base = ask(native, [None] * SLOTS)
    answers = {str(answer) for batch in [base[:1], *expected] for answer in batch}
    assert len(answers) == 1 + 2 * len(adapters), "no two adapters answer alike"

    async def main() -> None:
        async with cache_of(ours) as cache:
            before = unleased(ours)
            for batch, answer in [*zip(batches, expected, strict=True)] * 2:
                async with in_slots(cache, batch) as loras:
                    assert ask(ours, loras) == answer
            async with in_slots(cache, batches[0]) as loras:
                corrupt(ours, loras[0])
                same = [a == b for a, b in zip(ask(ours, loras), expected[0], strict=True)]
                assert same == [False, True, True] * 2, "one wrong number is seen"
            assert unleased(ours) == before

    run(main())
