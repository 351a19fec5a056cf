"""Offline batches over many adapters: `lora_cache.LLM` beside plain `vllm.LLM`.

    python -m benchmarks.bench_offline [--model DIR] [--adapters DIR] [--json FILE]

The same prompts with the same adapters in the same order, on two engines started alike in one
process, turn by turn; each turn starts without adapters in the engine.  Plain vLLM gets a list of
LoRARequests, which its scheduler groups by itself.  Without arguments: the demo's chat model and
its six adapters, each as it is and once more with twice its alpha, which makes twelve.  With
`--llama-8b`, for a GPU: shapes of Llama-3.1-8B, dummy weights, CUDA graphs, random prompts of 256
tokens, twelve random adapters of 84 MB; one size of `--max-loras` a run, for two engines fill the
card.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import shapes
from benchmarks.report import write_raw
from lora_cache.demo.catalogue import ADAPTERS, PROMPTS, adapter_dir

Row = dict[str, Any]

CPU_ENGINE: Row = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 256 << 20,
    "dtype": "float32",
}
GPU_ENGINE: Row = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 48, 64]},
    "kv_cache_memory_bytes": 4 << 30,
    "gpu_memory_utilization": 0.4,
    "dtype": "bfloat16",
}


def demo_adapters(root: Path) -> list[Path]:
    """Twelve adapters of distinct content: each of the six, and the same with twice its alpha."""
    made = []
    for copy in range(2):
        for name in ADAPTERS:
            target = root / f"{name}-{copy}"
            shutil.copytree(adapter_dir(name), target)
            config = json.loads((target / "adapter_config.json").read_text())
            config["lora_alpha"] = config["lora_alpha"] * (1 + copy)
            (target / "adapter_config.json").write_text(json.dumps(config))
            made.append(target)
    return made


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


class Loads:
    """Counts activations inside an in-process engine, and empties it."""

    def __init__(self, llm: Any) -> None:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        self._worker = executor.driver_worker.worker.model_runner.lora_manager
        self._manager = self._worker._adapter_manager
        self._activate = self._manager.activate_adapter
        self.activations = 0
        self._manager.activate_adapter = self._counted

    def _counted(self, lora_id: int) -> bool:
        fresh: bool = self._activate(lora_id)
        self.activations += fresh
        return fresh

    def clear(self) -> None:
        self._manager.remove_all_adapters()
        self.activations = 0


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapters", type=Path, help="directory of adapter directories")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--max-loras", type=int, action="append")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-8b", action="store_true", help="shapes only; needs a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.lora.request import LoRARequest

    from lora_cache import LLM
    from lora_cache.demo.model import prepare_model

    with tempfile.TemporaryDirectory() as scratch:
        if options.llama_8b:
            adapters = shapes.write_adapters(Path(scratch) / "adapters", 12)
        elif options.adapters:
            adapters = sorted(
                path.parent for path in options.adapters.glob("*/adapter_config.json")
            )
        else:
            adapters = demo_adapters(Path(scratch))
        rng = random.Random(options.seed)
        which = [rng.randrange(len(adapters)) for _ in range(options.prompts)]
        prompts: list[Any] = [rng.choice(PROMPTS) for _ in which]
        engine_arguments = CPU_ENGINE
        if options.llama_8b:
            model = str(shapes.write_model(Path(scratch) / "model"))
            engine_arguments = GPU_ENGINE
            prompts = [
                {"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(256)]}
                for _ in which
            ]
        else:
            model = str(options.model or prepare_model())
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=options.tokens,
            ignore_eos=True,
            detokenize=not options.llama_8b,
        )
        requests = [LoRARequest(f"plain-{i}", i + 1, str(path)) for i, path in enumerate(adapters)]

        rows: list[Row] = []
        alive: list[Any] = []  # in-process engines share groups: collecting one ends the others
        for max_loras in options.max_loras or [2, 4]:
            arguments = {
                **engine_arguments,
                "max_loras": max_loras,
                "max_cpu_loras": len(adapters) + 1,
                "max_lora_rank": 16,
                "enable_lora": True,
                "enable_prefix_caching": False,
            }
            plain, ours = vllm.LLM(model, **arguments), LLM(model, **arguments)
            alive += [plain, ours]
            engines = {"vllm.LLM": plain, "lora_cache.LLM": ours}
            loads = {name: Loads(engine) for name, engine in engines.items()}
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            activations: dict[str, list[int]] = {name: [] for name in engines}
            answers: dict[str, Any] = {}
            for turn in range(options.turns + 1):  # the first one warms up and is not counted
                order = list(engines.items())
                for name, engine in order if turn % 2 else reversed(order):
                    chosen: list[Any] = [requests[i] for i in which]
                    if name == "lora_cache.LLM":
                        chosen = [str(adapters[i]) for i in which]
                        for path in adapters:
                            ours.unload(path)
                        loads[name].activations = 0
                    else:
                        loads[name].clear()
                    began = time.perf_counter()
                    outputs = engine.generate(prompts, params, lora_request=chosen, use_tqdm=False)
                    if turn:
                        seconds[name].append(time.perf_counter() - began)
                        activations[name].append(loads[name].activations)
                    answers[name] = tokens_of(outputs)
            for name in engines:
                rows.append(
                    {
                        "engine": name,
                        "max_loras": max_loras,
                        "seconds": [round(value, 3) for value in seconds[name]],
                        "median_s": round(statistics.median(seconds[name]), 3),
                        "activations": activations[name],
                        "same_answers": sum(
                            a == b for a, b in zip(answers[name], answers["vllm.LLM"], strict=True)
                        ),
                    }
                )

    table = Table(title=f"{options.prompts} prompts over {len(adapters)} adapters")
    for column in ("engine", "max_loras", "median s", "ratio", "activations", "same answers"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        base = next(r for r in rows if r["max_loras"] == row["max_loras"])
        table.add_row(
            row["engine"],
            str(row["max_loras"]),
            f"{row['median_s']:.2f}",
            f"{row['median_s'] / base['median_s']:.2f}",
            f"{max(row['activations'])}",
            f"{row['same_answers']} of {options.prompts}",
        )
    Console().print(table)
    if options.json:
        write_raw(
            options.json,
            "benchmarks.bench_offline",
            ("torch",),
            vllm=vllm.__version__,
            hardware=_device(),
            seed=options.seed,
            rows=rows,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
