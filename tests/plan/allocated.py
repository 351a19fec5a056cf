"""What vLLM itself allocates: of engines that run, and of models that take no memory at all.

A model is built on PyTorch's "meta" device by vLLM's own code: every tensor has its shape, and no
bytes.  So the largest models fit, and as one of any number of GPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.real.engines import engine_arguments


@dataclass(frozen=True)
class Allocated:
    """Bytes on one GPU."""

    slots: int  # of everything that LoRA layers hold for adapters
    reordering: int  # of the table that reorders the vocabulary under tensor parallelism
    weights: int


def lora_bytes(manager: Any) -> tuple[int, int]:
    """Bytes of all distinct tensors of LoRA layers, whatever they are called; and that table's.

    Views (of experts, of the embedding table) are told by their storage.
    """
    import torch

    sizes: dict[int, int] = {}
    tables: dict[int, int] = {}
    for layer in manager.modules.values():
        for name, value in vars(layer).items():
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if torch.is_tensor(tensor):
                    storage = tensor.untyped_storage()
                    found = tables if name == "sharded_to_full_mapping_gpu" else sizes
                    found[storage._cdata] = storage.nbytes()
    return sum(sizes.values()), sum(tables.values())


def weight_bytes(model: Any) -> int:
    """Bytes of all distinct parameters."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    held: int = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    return held + sum(map(_repacked_bytes, model.modules()))


def _repacked_bytes(layer: Any) -> int:
    """What is missing where vLLM has repacked a layer: some CPUs have kernels that want that.

    The parameter is left empty then, and a bias may have become one of float32.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight.numel() or not hasattr(layer, "cpu_linear"):
        return 0
    inputs = getattr(layer, "input_size_per_partition", layer.input_size)
    numbers = inputs * getattr(layer, "output_size_per_partition", layer.output_size)
    grown = 0 if bias is None else bias.nbytes - bias.numel() * weight.element_size()
    return int(numbers * weight.element_size() - grown)


class WorkerThatTells:
    """What a worker of vLLM's is extended by, to be asked by name."""

    model_runner: Any

    def allocated(self) -> tuple[int, int]:
        """Bytes of slots and what is beside them, and of weights."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sum(lora_bytes(manager)), weight_bytes(self.model_runner.model)


Build = Callable[..., Allocated]


@pytest.fixture(scope="session")
def build() -> Build:
    """`build(directory, tp, **settings)`: what vLLM would allocate on one of `tp` GPUs."""
    pytest.importorskip("vllm")
    return _build


def _build(directory: Path, tp: int = 1, **settings: Any) -> Allocated:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = engine_arguments(directory, **{"dtype": "bfloat16", "max_num_seqs": 4, **settings})
    arguments["max_cpu_loras"] = arguments["max_loras"]
    config = EngineArgs(**arguments).create_engine_config()
    _forget_packed_modules()
    with (
        set_current_vllm_config(config),
        _one_of(tp),
        _own_rotations(),
        torch.device("meta"),
        set_default_torch_dtype(config.model_config.dtype),
    ):
        model = initialize_model(vllm_config=config)
        weights = weight_bytes(model)
        _make_kernels(model)
        vocab = config.model_config.get_vocab_size()
        device = torch.device("meta")
        manager: Any = LoRAModelManager(model, 4, 128, vocab, config.lora_config, device, config)
    return Allocated(*lora_bytes(manager), weights)


@contextmanager
def _one_of(tp: int) -> Iterator[None]:
    """Be the first of `tp` workers, without the others: nothing is sent while a model is built."""
    from vllm.distributed import parallel_state as state

    if state._WORLD is None:
        meeting = Path(tempfile.mkdtemp(), "meeting")
        state.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        state.ensure_model_parallel_initialized(1, 1)
    state._EP = state._EP or state._DP
    real = state._TP

    class Group:
        world_size, rank_in_group = tp, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    state._TP = Group()
    try:
        yield
    finally:
        state._TP = real


@contextmanager
def _own_rotations() -> Iterator[None]:
    """vLLM shares rotary embeddings between models: those that are made here have no numbers."""
    from vllm.model_executor.layers import rotary_embedding

    shared = rotary_embedding._ROPE_DICT
    others = dict(shared)
    shared.clear()
    try:
        yield
    finally:
        shared.clear()
        shared.update(others)


def _make_kernels(model: Any) -> None:
    """Experts get their kernels when weights are loaded, which never happens here."""
    from vllm.model_executor.layers.fused_moe import MoERunner

    for module in model.modules():
        if isinstance(module, MoERunner):
            experts = module.routed_experts
            experts.quant_method.process_weights_after_loading(experts)


def _forget_packed_modules() -> None:
    """vLLM notes in a class what one model of it has: a later one in this process would see it."""
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

    for kind in (Qwen2MoeForCausalLM, Qwen3MoeForCausalLM):
        kind.packed_modules_mapping.pop("gate_up_proj", None)
