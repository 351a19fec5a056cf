"""In-process engines with dummy weights, one of each kind, made when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.real.engines import ALIVE, engine_arguments
from tests.resident.parts import MAX_LORAS, MAX_RANK, slot_of, write_adapter, write_model


class Rig:
    """One engine's LoRA manager, its layout and a writer."""

    def __init__(self, llm: Any) -> None:
        from lora_cache.engines.resident.describe import describe
        from lora_cache.engines.resident.slots import SlotWriter

        executor = llm.llm_engine.engine_core.engine_core.model_executor
        self.worker = executor.driver_worker.worker.model_runner.lora_manager
        self.manager = self.worker._adapter_manager
        self.layout = describe(self.manager)
        self.writer = SlotWriter(self.manager, self.layout)
        self.next_id = 1

    def request(self, directory: Path) -> Any:
        from vllm.lora.request import LoRARequest

        self.next_id += 1
        return LoRARequest(
            lora_name=f"a{self.next_id}", lora_int_id=self.next_id, lora_path=str(directory)
        )

    def native(self, directory: Path) -> dict[str, Any]:
        """What vLLM itself puts in a slot, through its own `add_adapter`."""
        request = self.request(directory)
        self.worker.add_adapter(request)
        held = slot_of(self.manager, self.manager.lora_index_to_id.index(request.lora_int_id))
        self.worker.remove_adapter(request.lora_int_id)
        return held

    def image(self, directory: Path) -> tuple[Any, Any]:
        """A packed adapter: the image (a flat uint8 tensor), and its contents."""
        import numpy as np
        import torch

        from lora_cache.engines.resident.packing import examine, pack

        contents = examine(self.layout, directory)
        buffer = np.full(self.layout.nbytes(contents), 0xA5, np.uint8)
        assert pack(self.layout, directory, buffer) == contents
        return torch.from_numpy(buffer), contents


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rig]:
    """`rig("llama", "bfloat16")`: an engine of that kind, the same one for all tests."""
    pytest.importorskip("vllm")
    made: dict[tuple[str, str], Rig] = {}

    def make(kind: str = "llama", dtype: str = "bfloat16") -> Rig:
        if (kind, dtype) not in made:
            from vllm import LLM
            from vllm.distributed import parallel_state

            # The process groups are those of the first engine, which need not be a mixture: then
            # there is none for experts.  With one worker all groups are alike.
            if parallel_state._DP and not parallel_state._EP:
                parallel_state._EP = parallel_state._DP
            arguments = engine_arguments(
                write_model(tmp_path_factory.mktemp(f"{kind}-{dtype}"), kind),
                load_format="dummy",
                dtype=dtype,
                max_loras=MAX_LORAS,
                max_cpu_loras=MAX_LORAS,
                max_lora_rank=MAX_RANK,
                max_num_seqs=4,
            )
            ALIVE.append(LLM(**arguments))
            made[kind, dtype] = Rig(ALIVE[-1])
        return made[kind, dtype]

    return make


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter, each into a directory of its own."""
    count = 0

    def make(**arguments: Any) -> Path:
        nonlocal count
        count += 1
        return write_adapter(tmp_path / f"adapter{count}", **arguments)

    return make
