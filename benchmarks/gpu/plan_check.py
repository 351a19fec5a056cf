"""Is a plan right?  What `lora-cache plan` reckons, beside what vLLM allocates on a GPU.

    python3 -m benchmarks.gpu.plan_check --json OUT     (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.plan_check --tiny         (CPU, a minute: slots and weights only)

For each number of slots and each rank an engine with dummy weights is started in a process of its
own, and asked what it has: bytes of slots and weights must be equal, to the byte; what is left for
the KV cache puts the estimate of the room to work to the test (`working_ratio`: reckoned by
measured).  If that is far from 1, ``working_estimate`` in ``lora_cache/plan/budget.py`` is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import write_raw
from benchmarks.shapes import LLAMA_8B, write_model
from lora_cache.plan import EngineSettings, SlotSettings, make_budget, read_model

Row = dict[str, Any]

GIB = 1 << 30
TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def measure(model: Path, slots: int, rank: int, options: argparse.Namespace) -> Row:
    """Start an engine in this process, and look into its worker."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM

    settings: Row = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": slots,
        "max_lora_rank": rank,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "gpu_memory_utilization": options.utilization,
    }
    if options.tiny:
        settings |= {"kv_cache_memory_bytes": 16 << 20, "enforce_eager": True}
    llm = LLM(**settings)
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    runner = worker.model_runner
    sizes = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for layer in runner.lora_manager._adapter_manager.modules.values()
        for value in vars(layer).values()
        for tensor in (value if isinstance(value, tuple | list) else (value,))
        if torch.is_tensor(tensor)
    }
    parameters = [p.untyped_storage() for p in runner.model.parameters()]
    found: Row = {
        "slot_bytes": sum(sizes.values()),
        "weight_bytes": sum({s._cdata: s.nbytes() for s in parameters}.values()),
    }
    if torch.cuda.is_available():
        config = core.vllm_config.cache_config
        found |= {
            "device": torch.cuda.get_device_name(),
            "total_memory": int(worker.init_snapshot.total_memory),
            "requested_memory": int(worker.requested_memory),
            "model_memory": int(runner.model_memory_usage),
            "peak_activation": int(worker.peak_activation_memory),
            "non_torch": int(getattr(worker, "non_torch_memory", 0)),
            "cudagraph_estimate": int(worker.cudagraph_memory_estimate),
            "kv_bytes": int(worker.available_kv_cache_memory_bytes),
            "kv_tokens": int(config.num_gpu_blocks) * int(config.block_size),
            "free_after": torch.cuda.mem_get_info()[0],
        }
    return found


def in_process(model: Path, slots: int, rank: int) -> Row:
    """`measure` in a process of its own: what one engine leaves behind is no other's."""
    command = [sys.executable, "-m", "benchmarks.gpu.plan_check", *sys.argv[1:]]
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command += ["--measure", f"{model}:{slots}:{rank}:{result.name}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured: Row = json.loads(Path(result.name).read_text())
    return measured


def compare(model: Path, slots: int, rank: int, options: argparse.Namespace) -> Row:
    """Reckon, measure, and put both side by side."""
    measured = in_process(model, slots, rank)
    engine = EngineSettings(
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory_utilization=options.utilization,
    )
    total = measured.get("total_memory", 80 * GIB)
    budget = make_budget(read_model(model), SlotSettings(rank), engine, total)
    row = {
        "slots": slots,
        "rank": rank,
        "bytes_per_slot": budget.slots.bytes_per_slot,
        "slots_equal": measured["slot_bytes"] == slots * budget.slots.bytes_per_slot,
        "weights_equal": measured["weight_bytes"] == budget.weight_bytes,
        "planned_working": budget.working_bytes,
        "planned_kv_bytes": budget.kv_bytes(slots),
        "planned_kv_tokens": budget.kv_tokens(slots),
        "measured": measured,
    }
    if "kv_bytes" in measured:
        held = budget.weight_bytes + budget.slots.nbytes(slots)
        working = measured["requested_memory"] - measured["kv_bytes"] - held
        row |= {
            "measured_working": working,
            "working_ratio": round(budget.working_bytes / working, 3),
            "kv_ratio": round(budget.kv_tokens(slots) / measured["kv_tokens"], 4),
        }
    return row


def show(rows: list[Row]) -> None:
    table = Table(title="reckoned beside measured")
    columns = ("slots", "rank", "bytes a slot", "slots", "weights", "to work GiB", "KV tokens")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        measured = row["measured"]
        working = kv = "–"
        if "kv_bytes" in measured:
            pair = (row["planned_working"], row["measured_working"])
            working = " / ".join(f"{n / GIB:.2f}" for n in pair)
            kv = f"{row['planned_kv_tokens']:,} / {measured['kv_tokens']:,}"
        table.add_row(
            str(row["slots"]),
            str(row["rank"]),
            f"{row['bytes_per_slot']:,}",
            "equal" if row["slots_equal"] else f"{measured['slot_bytes']:,}",
            "equal" if row["weights_equal"] else f"{measured['weight_bytes']:,}",
            working,
            kv,
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--slots", default="1,8,32")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, on the CPU")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.max_model_len = options.max_num_batched_tokens = 128
        options.max_num_seqs = 4

    if options.measure:
        model, slots, rank, result = options.measure.split(":")
        found = measure(Path(model), int(slots), int(rank), options)
        Path(result).write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # vLLM's teardown is of no interest here

    with tempfile.TemporaryDirectory() as directory:
        if options.tiny:
            LLAMA_8B.update(TINY)
        path = write_model(Path(directory))
        rows = [
            compare(path, int(slots), int(rank), options)
            for rank in options.ranks.split(",")
            for slots in options.slots.split(",")
        ]
    show(rows)
    if options.json:
        write_raw(options.json, "benchmarks.gpu.plan_check", ("vllm", "torch"), rows=rows)
    return int(not all(row["slots_equal"] and row["weights_equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
