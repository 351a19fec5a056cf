"""Which launch configurations suit vLLM's LoRA kernels on this GPU?

    python3 -m benchmarks.gpu.lora_kernels --folder benchmarks/data/lora_kernels --json OUT   (GPU)
    TRITON_INTERPRET=1 python3 -m benchmarks.gpu.lora_kernels --tiny --folder DIR             (CPU)

Every linear layer of a batch with adapters is two more kernels: *shrink* (times A, to the rank) and
*expand* (times B, and added).  vLLM launches them with default configurations unless
``VLLM_TUNED_CONFIG_FOLDER`` has some for the GPU.  Here a few dozen are tried for the shapes of
a model, by vLLM's own calls in CUDA graphs, and the fastest written as vLLM reads them.

Give `--model`, and `--slots` and `--rank` as it is served with (``max_loras``, ``max_lora_rank``).
With tensor parallelism each GPU has a share of a layer: those shapes are not measured.  A folder
takes several models, slots and ranks, one run after the other.

A step of `tokens` tokens is one of our serving measurement: up to 128 of them are decoded, their
adapters drawn by Zipf(1.0) from 200; what is more are prompts of 512, of one adapter each.  The
weights of several layers take turns, so that none is in the GPU's cache from the last time.

What the adapters add to a step is the sum over the kernels of a layer, times the layers.  *Only the
active* says what it would be if a grid had no places for adapters that are not in the batch
(``specialize_active_lora``), with the fastest configurations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import rig
from lora_cache.bench.models import LLAMA_8B, find_config, widths
from lora_cache.bench.servers import Row
from lora_cache.bench.streams import zipf

Config = dict[str, int | None]

DECODED = 128  # steps of more tokens have a prompt in them
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)
#: Linear layers that vLLM computes as one.
MERGED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
TINY = LLAMA_8B | {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 16}
_ADAPTERS, _PROMPT = 200, 512
_SETS, _DRAWS, _REPEATS = 4, 2, 5


@dataclass(frozen=True)
class Shape:
    """A kernel of a layer, in a step of so many tokens.

    Attributes:
        op: "shrink" or "expand".
        width: of the linear layer's input, in elements.
        outputs: widths of the outputs that vLLM computes as one.
    """

    op: str
    width: int
    outputs: tuple[int, ...]
    tokens: int

    @property
    def slices(self) -> int:
        return len(self.outputs)


def shapes(config: dict[str, Any], tokens: Sequence[int] = TOKENS) -> list[Shape]:
    """All kernels of one layer, for steps of so many tokens."""
    of = widths(config)
    linear = [(of[names[0]][0], tuple(of[name][1] for name in names)) for names in MERGED]
    return [
        Shape(op, width, outputs, number)
        for number in tokens
        for width, outputs in linear
        for op in ("shrink", "expand")
    ]


def candidates(shape: Shape, rank: int) -> Iterator[Config]:
    """What is tried beside vLLM's default."""
    decodes = shape.tokens <= DECODED
    if shape.op == "shrink":
        for block_m, block_n, block_k, split_k, warps in itertools.product(
            (16,) if decodes else (16, 32, 64),
            sorted({max(16, min(rank, 64)), max(16, min(rank, 128))}),
            (64, 128, 256, 512) if decodes else (64, 128),
            (2, 4, 8, 16, 32, 64) if decodes else (2, 4, 8, 16),
            (2, 4, 8) if decodes else (4,),
        ):
            if shape.width % (block_k * split_k) == 0:
                yield _config(block_m, block_n, block_k, warps) | {
                    "split_k": split_k,
                    "group_size_m": 8,
                }
    else:
        for block_m, block_n, warps in itertools.product(
            (16,) if decodes else (16, 32, 64, 128),
            (32, 64, 128, 256, 512) if decodes else (64, 128, 256),
            (1, 2, 4, 8) if decodes else (4, 8),
        ):
            yield _config(block_m, block_n, max(16, min(64, rank)), warps)


def _config(block_m: int, block_n: int, block_k: int, warps: int) -> Config:
    return {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "num_warps": warps,
        "num_ctas": 1,
        "num_stages": 2,
        "max_nreg": None,
    }


class Bench:
    """Runs kernels of vLLM with any configuration."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils
        from vllm.utils import torch_utils

        if options.tiny:
            torch_utils.PIN_MEMORY = False
        self.torch = torch
        self.options = options
        self.device = "cpu" if options.tiny else "cuda"
        self._addresses = (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT)
        self._modules = {"shrink": lora_shrink_op, "expand": lora_expand_op}
        self._default = lora_shrink_op.get_lora_op_configs
        torch.manual_seed(0)
        torch.set_default_device(self.device)

    def default(self, shape: Shape) -> Config:
        """What vLLM launches it with by itself."""
        shrinks = shape.op == "shrink"
        return dict(
            self._default(
                shape.op,
                max_loras=self.options.slots + 1,
                batch=shape.tokens,
                hidden_size=shape.width if shrinks else max(shape.outputs),
                rank=self.options.rank,
                num_slices=shape.slices,
                add_inputs=None if shrinks else True,
            )
        )

    @lru_cache(maxsize=2)  # noqa: B019  one bench a process
    def weights(self, shape: Shape) -> list[list[Any]]:
        """The slots of some layers: `_SETS` of them, one tensor for each output."""
        slots, rank = self.options.slots, self.options.rank
        for known in self._addresses:  # vLLM knows tensors by their addresses, which come again
            known.clear()
        return [
            [
                self.torch.randn(
                    *((slots, 1, rank, shape.width) if shape.op == "shrink" else ()),
                    *((slots, 1, output, rank) if shape.op == "expand" else ()),
                    dtype=self.torch.bfloat16,
                )
                for output in shape.outputs
            ]
            for _ in range(_SETS)
        ]

    @lru_cache(maxsize=32)  # noqa: B019
    def batch(self, tokens: int, draw: int, active: bool) -> tuple[Any, ...]:
        """What vLLM tells its kernels of a step: whose token is whose."""
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

        rng = random.Random(f"{tokens} {draw}")
        weights = zipf(list(range(_ADAPTERS)), 1.0)
        prompts = 0 if tokens <= DECODED else -(-tokens // _PROMPT)
        drawn = rng.choices(range(_ADAPTERS), weights, k=min(tokens, 24 if prompts else DECODED))
        for number in range(prompts):
            share = (tokens - 24) // prompts + (number < (tokens - 24) % prompts)
            drawn += rng.choices(range(_ADAPTERS), weights) * share
        slots = {adapter: place for place, adapter in enumerate(dict.fromkeys(drawn))}
        mapping = [slots[adapter] % self.options.slots for adapter in drawn]
        meta = LoRAKernelMeta.make(self.options.slots, tokens, self.device)
        meta.prepare_tensors(self.torch.tensor(mapping, dtype=self.torch.int32))
        found: tuple[Any, ...] = meta.meta_args(tokens, specialize_active_lora=active)
        return found

    def calls(self, shape: Shape, config: Config, active: bool = False) -> list[Callable[[], Any]]:
        """One call for each layer and draw; each returns what it wrote."""
        torch, rank = self.torch, self.options.rank
        module = self._modules[shape.op]
        module.get_lora_op_configs = lambda *_, **__: config
        narrow = torch.randn(shape.slices, shape.tokens, rank, dtype=torch.float32)
        if shape.op == "shrink":
            inputs = torch.randn(shape.tokens, shape.width, dtype=torch.bfloat16)
            output, run = narrow, partial(module._lora_shrink, scaling=1.0)
        else:
            inputs = narrow
            output = torch.zeros(shape.tokens, sum(shape.outputs), dtype=torch.bfloat16)
            run = partial(module._lora_expand, add_inputs=True)

        def call(weights: list[Any], draw: int) -> Any:
            run(inputs, weights, output, *self.batch(shape.tokens, draw, active))
            return output

        return [
            partial(call, weights, draw)
            for draw in range(_DRAWS)
            for weights in self.weights(shape)
        ]

    def works(self, shape: Shape, config: Config) -> bool:
        """Compiled, if need be, and run; large blocks may be too large for the GPU."""
        from triton.runtime.errors import OutOfResources

        try:
            self.calls(shape, config)[0]()
        except OutOfResources:
            return False
        return True

    def microseconds(self, shape: Shape, config: Config, active: bool = False) -> float:
        """Of one kernel, in a CUDA graph: the median of some runs."""
        torch, calls = self.torch, self.calls(shape, config, active)
        if self.options.tiny:
            calls[0]()
            return 1.0
        for call in calls:  # compiled, and all that vLLM remembers is there before the capture
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        took = []
        for _ in range(_REPEATS + 1):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            took.append(1e3 * began.elapsed_time(ended) / len(calls))
        return float(median(took[1:]))

    def agrees(self, shape: Shape, config: Config) -> bool:
        """It computes what the default does."""
        torch = self.torch
        results = []
        for each in (self.default(shape), config):
            torch.manual_seed(1)  # the same inputs
            results.append(self.calls(shape, each)[0]().clone().float())
        return bool(torch.allclose(*results, rtol=2e-2, atol=2e-2 * results[0].std().item()))


_mine: Bench | None = None


def _compile(options: argparse.Namespace, share: list[tuple[Shape, Config]]) -> None:
    """Triton keeps what it compiles on disk, so that others find it."""
    global _mine
    _mine = _mine or Bench(options)
    for shape, config in share:
        _mine.works(shape, config)


def compile_all(options: argparse.Namespace, every: list[tuple[Shape, Config]]) -> None:
    """Each kernel is compiled once, by all cores.  Widths and tokens make no other kernel."""
    different: dict[Any, tuple[Shape, Config]] = {}
    for shape, config in every:
        different.setdefault((shape.op, shape.slices, tuple(config.items())), (shape, config))
    share = list(different.values())
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in [pool.submit(_compile, options, share[n::workers]) for n in range(workers)]:
            done.result()
    print(f"{len(share)} kernels are compiled", flush=True)


def search(bench: Bench, shape: Shape) -> Row:
    """The default and the fastest."""
    default = bench.default(shape)
    took = {}
    tried = itertools.islice(
        candidates(shape, bench.options.rank), 2 if bench.options.tiny else None
    )
    for config in (config for config in tried if bench.works(shape, config)):
        took[json.dumps(config)] = bench.microseconds(shape, config)
    fastest = [json.loads(text) for text in sorted(took, key=took.__getitem__)[:5]]
    found = next((config for config in fastest if bench.agrees(shape, config)), default)
    return {
        "op": shape.op,
        "width": shape.width,
        "outputs": list(shape.outputs),
        "tokens": shape.tokens,
        "tried": len(took),
        "default": default,
        "default_us": round(bench.microseconds(shape, default), 2),
        "config": found,
        "us": round(bench.microseconds(shape, found), 2),
        "active_us": round(bench.microseconds(shape, found, active=True), 2),
    }


def write(folder: Path, gpu: str, options: argparse.Namespace, rows: list[Row]) -> None:
    """As vLLM reads them: by slots, slices, tokens, and the two sizes of the matrix.

    What the files have for others stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for op, suffix in (("shrink", "SHRINK"), ("expand", "EXPAND_TRUE")):
        path = folder / f"{gpu.replace(' ', '_').replace('-', '_')}_{suffix}.json"
        tree: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for row in (row for row in rows if row["op"] == op):
            sizes = (row["width"], options.rank)
            if op == "expand":
                sizes = (options.rank, max(row["outputs"]))
            keys = (options.slots + 1, len(row["outputs"]), row["tokens"], *sizes)
            place = tree
            for key in keys[:-1]:
                place = place.setdefault(str(key), {})
            place[str(keys[-1])] = row["config"]
        path.write_text(json.dumps(tree, indent=1) + "\n")


def steps(rows: list[Row], layers: int) -> list[tuple[int, float, float, float]]:
    """Tokens, and what adapters add to a step in ms: by default, at best, only the active."""
    found = []
    for tokens in sorted({row["tokens"] for row in rows}):
        mine = [row for row in rows if row["tokens"] == tokens]
        sums = (layers * sum(r[k] for r in mine) / 1e3 for k in ("default_us", "us", "active_us"))
        found.append((tokens, *sums))
    return found


def table(rows: list[Row], layers: int) -> str:
    lines = [f"{'tokens':>8}{'default':>10}{'fastest':>10}{'only the active':>17}   ms a step"]
    lines += [f"{n:8}{a:10.2f}{b:10.2f}{c:17.2f}" for n, a, b, c in steps(rows, layers)]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="interpreted; says that it runs")
    parser.add_argument("--folder", type=Path, required=True, help="where configurations go")
    parser.add_argument("--model", default="llama-3.1-8b", help="as `lora-cache bench` has it")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16, help="of a slot (max_lora_rank)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    rig.stop_politely()
    began = time.perf_counter()
    config: dict[str, Any] = TINY if options.tiny else find_config(options.model)
    layers = config["num_hidden_layers"]
    every = shapes(config, (16, 160)) if options.tiny else shapes(config)
    bench = Bench(options)
    tried = [(s, c) for s in every for c in (bench.default(s), *candidates(s, options.rank))]
    if not options.tiny:
        compile_all(options, tried)
    record = rig.Record(options, layers=layers)
    for shape in every:
        record.add(search(bench, shape))
    gpu = "CPU" if options.tiny else bench.torch.cuda.get_device_name()
    write(options.folder, gpu, options, record.rows)
    print(f"{time.perf_counter() - began:.0f} s\n{table(record.rows, layers)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
