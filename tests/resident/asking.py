"""Speaking to an in-process engine, and looking into it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.resident.scripted import ScriptedManager

SLOTS = 3
FIRST_ID = 1 << 20  # far from the ids that a cache gives, which go up from 1 << 30


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def request(number: int, path: Path, **changes: Any) -> Any:
    from vllm.lora.request import LoRARequest

    fields: dict[str, Any] = {
        "lora_name": f"a{number}",
        "lora_int_id": FIRST_ID + number,
        "lora_path": str(path),
        **changes,
    }
    return LoRARequest(**fields)


def prompts(count: int, seed: int = 0) -> list[Any]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(3, 250) for _ in range(9)]} for _ in range(count)]


def tokens(llm: Any, loras: list[Any], length: int = 12) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    outputs = llm.generate(prompts(len(loras)), params, lora_request=loras, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def attach(llm: Any, manager: ScriptedManager) -> None:
    from vllm.lora.request import LoRARequest

    assert llm.llm_engine.add_lora(LoRARequest("lora_cache:attach", 1 << 29, manager.path))
    manager.welcome()


def detach(llm: Any) -> None:
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest("lora_cache:detach", 1 << 29, "/"))


def ids(*numbers: int) -> list[int]:
    return [FIRST_ID + number for number in numbers]


def unleased(llm: Any) -> int:
    return int(runner_of(llm).lora_manager.unleased)


def slot_index(llm: Any) -> list[int | None]:
    found: list[int | None] = runner_of(llm).lora_manager._adapter_manager.lora_index_to_id
    return found
