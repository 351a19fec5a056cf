"""One engine with our manager in it, what stock vLLM writes and answers, and a scripted manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real.engines import ALIVE, engine_arguments, switched_on
from tests.resident.asking import SLOTS, attach, detach, request, runner_of, tokens
from tests.resident.scripted import ScriptedManager, agents, image_of, whole_slot_parts

COUNT = 6  # adapters


@pytest.fixture(scope="session")
def ours(tiny_model: Path) -> Any:
    """An engine with our manager in it; other engines of the process keep vLLM's."""
    from vllm import LLM

    with switched_on():
        ALIVE.append(LLM(**engine_arguments(tiny_model, max_loras=SLOTS, max_cpu_loras=SLOTS)))
    runner_of(ALIVE[-1]).lora_manager.parts_of = whole_slot_parts
    return ALIVE[-1]


@pytest.fixture(scope="session")
def loras(adapters: list[Path]) -> list[Any]:
    return [request(number, adapters[number]) for number in range(COUNT)]


@pytest.fixture(scope="session")
def images(llm: Any, loras: list[Any]) -> dict[int, torch.Tensor]:
    """What stock vLLM writes into a slot for each adapter."""
    manager = runner_of(llm).lora_manager._adapter_manager
    found = {}
    for lora in loras:
        llm.llm_engine.add_lora(lora)
        slot = manager.lora_index_to_id.index(lora.lora_int_id)
        found[lora.lora_int_id] = image_of(manager, slot)
        llm.llm_engine.remove_lora(lora.lora_int_id)
    return found


@pytest.fixture(scope="session")
def stock(llm: Any, loras: list[Any]) -> Callable[[list[int], int], list[list[int]]]:
    """Tokens of stock vLLM, for adapters by number."""
    known: dict[tuple[tuple[int, ...], int], list[list[int]]] = {}

    def answer(which: list[int], length: int = 12) -> list[list[int]]:
        key = (tuple(which), length)
        if key not in known:
            known[key] = tokens(llm, [loras[number] for number in which], length)
            for lora in loras:
                llm.llm_engine.remove_lora(lora.lora_int_id)
        return known[key]

    return answer


@pytest.fixture
def manager(ours: Any, images: dict[int, torch.Tensor]) -> Iterator[ScriptedManager]:
    assert agents() == []
    with ScriptedManager(images) as scripted:
        attach(ours, scripted)
        runner_of(ours).lora_manager.unleased = 0
        try:
            yield scripted
        finally:
            detach(ours)
    assert agents() == []
    assert ours.llm_engine.list_loras() == set()
