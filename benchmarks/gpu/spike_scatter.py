"""May a thread fill LoRA slots while the engine decodes?  Shown on a whole vLLM engine.

    python3 -m benchmarks.gpu.spike_scatter --json OUT      (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.spike_scatter --tiny          (CPU, a minute)

32 requests decode on adapters in four slots.  A thread of the same process copies slot images from
page-locked memory on a side stream and scatters them into the other slots.  Checked: the written
slots equal natively activated ones (`torch.equal`); the decoding requests give the tokens of a run
without scatters; an adapter published in mid-run gives the tokens of one loaded natively.

vLLM's Triton shrink kernel adds up its split-K parts with atomics, in any order, so two runs of
stock vLLM need not agree; for exact comparisons it is told to use one part (``--split-k`` leaves
it alone).  A second run without scatters is the control.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BUSY, SPARE, SLOTS, RANK = 4, 4, 8, 16
FIRST_ID = 1 << 30
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "torch_dtype": "float32",
}


def files(
    root: Path, number: int, tiny: bool, rank: int = RANK, seed: int = 0
) -> tuple[Path, list[Path]]:
    """A model and adapters for it: of Llama-3.1-8B's shapes, or of two narrow layers."""
    from benchmarks import shapes

    if tiny:
        shapes.LLAMA_8B |= TINY | {"bos_token_id": 1, "eos_token_id": 2}
    adapters = shapes.write_adapters(root / "adapters", number, rank, seed)
    return shapes.write_model(root / "model"), adapters


def one_part_shrink() -> None:
    """Make the shrink kernel's sum independent of the order in which its blocks run."""
    from vllm.lora.ops.triton_ops import lora_shrink_op

    stock = lora_shrink_op.get_lora_op_configs

    def configured(*args: Any, **kwargs: Any) -> Any:
        return {**stock(*args, **kwargs), "split_k": 1}

    lora_shrink_op.get_lora_op_configs = configured


class Slots:
    """The stacked tensors of every LoRA layer, slot by slot, and images of them."""

    def __init__(self, manager: Any) -> None:
        import torch

        self.torch = torch
        self.manager = manager
        self.cuda = torch.cuda.is_available()
        stacked, seen = [], set()
        for module in manager.modules.values():
            for name in ("lora_a_stacked", "lora_b_stacked"):
                held = getattr(module, name, ())
                for tensor in (held,) if isinstance(held, torch.Tensor) else held:
                    if tensor.data_ptr() not in seen:
                        seen.add(tensor.data_ptr())
                        stacked.append(tensor)
        self.targets = [[tensor[slot] for tensor in stacked] for slot in range(SLOTS)]
        self.device = stacked[0].device
        self.dtype = stacked[0].dtype
        self.elements = sum(tensor.numel() for tensor in self.targets[0])
        self.nbytes = self.elements * stacked[0].element_size()
        self.staging = torch.empty(self.elements, dtype=self.dtype, device=self.device)
        self.pieces = []
        offset = 0
        for target in self.targets[0]:
            piece = self.staging[offset : offset + target.numel()]
            self.pieces.append(piece.view(target.shape))
            offset += target.numel()
        self.stream = torch.cuda.Stream() if self.cuda else None

    def image(self, slot: int) -> Any:
        """The content of a slot, in page-locked memory."""
        flat = self.torch.empty(self.elements, dtype=self.dtype, pin_memory=self.cuda)
        flat.copy_(self.torch.cat([target.reshape(-1) for target in self.targets[slot]]))
        return flat

    def scatter(self, image: Any, slot: int) -> None:
        """Write `image` into a slot that nobody reads, and wait until it is there."""
        if self.stream is None:
            self.staging.copy_(image)
            self.torch._foreach_copy_(self.targets[slot], self.pieces)
            return
        with self.torch.cuda.stream(self.stream):
            self.staging.copy_(image, non_blocking=True)
            self.torch._foreach_copy_(self.targets[slot], self.pieces)
            done = self.torch.cuda.Event(blocking=True)  # waits without holding a core or the GIL
            done.record(self.stream)
        done.synchronize()

    def equals(self, image: Any, slot: int) -> bool:
        if self.cuda:
            self.torch.cuda.synchronize()
        return bool(self.torch.equal(self.image(slot), image))

    def spoil(self, slot: int) -> None:
        """Fill with what no adapter holds, so that a write that does not happen is seen."""
        for target in self.targets[slot]:
            target.fill_(7.0)

    def publish(self, lora_id: int, slot: int, model: Any) -> None:
        self.manager._registered_adapters[lora_id] = model
        self.manager._active_adapters[lora_id] = None
        self.manager.lora_index_to_id[slot] = lora_id

    def unpublish(self, lora_id: int) -> None:
        self.manager.remove_adapter(lora_id)


class Writer(threading.Thread):
    """Scatters the spare images into the spare slots in turn, until it is stopped."""

    def __init__(self, slots: Slots, images: list[Any], pause_s: float) -> None:
        super().__init__(name="scatter")
        self.slots, self.images, self.pause_s = slots, images, pause_s
        self.seconds: list[float] = []
        self.last: dict[int, int] = {}  # slot → image
        self.halt = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.halt.is_set():
            # One slot more than images apart, so that each slot sees each image.
            slot, which = BUSY + number % SPARE, (number + number // SPARE) % len(self.images)
            began = time.perf_counter()
            self.slots.scatter(self.images[which], slot)
            self.seconds.append(time.perf_counter() - began)
            self.last[slot] = which
            number += 1
            self.halt.wait(self.pause_s)


class Bench:
    """One in-process engine, driven step by step."""

    def __init__(self, llm: Any, adapters: list[Path], options: argparse.Namespace) -> None:
        from vllm.lora.request import LoRARequest

        self.engine = llm.llm_engine
        self.options = options
        core = self.engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.async_scheduling = core.vllm_config.scheduler_config.async_scheduling
        self.worker = self.runner.lora_manager
        self.requests = [
            LoRARequest(lora_name=f"a{i}", lora_int_id=FIRST_ID + i, lora_path=str(path))
            for i, path in enumerate(adapters)
        ]
        for request in self.requests[:BUSY]:
            self.engine.add_lora(request)
        self.slots = Slots(self.worker._adapter_manager)
        self.runs = 0

    def native_image(self, request: Any) -> tuple[Any, Any]:
        """What vLLM itself writes for an adapter, and the adapter as vLLM holds it."""
        self.engine.add_lora(request)
        manager = self.worker._adapter_manager
        slot = manager.lora_index_to_id.index(request.lora_int_id)
        image, model = self.slots.image(slot), manager.get_adapter(request.lora_int_id)
        self.engine.remove_lora(request.lora_int_id)
        return image, model

    def run(
        self, before_step: Callable[[int], Any | None] = lambda _: None
    ) -> tuple[dict[str, list[int]], list[float]]:
        """Decode 32 requests.

        Args:
            before_step: is called with the number of each step; a LoRARequest that it returns
                is served from then on.

        Returns:
            The tokens of each request, and the seconds of each step after the prefill.
        """
        from vllm import SamplingParams

        self.runs += 1
        params = SamplingParams(
            temperature=0, max_tokens=self.options.tokens, ignore_eos=True, detokenize=False
        )
        vocabulary = 400 if self.options.tiny else 100_000

        def prompt(seed: int) -> Any:
            return {
                "prompt_token_ids": [(seed * 7919 + i * 104729) % vocabulary for i in range(64)]
            }

        for i in range(self.options.requests):
            self.engine.add_request(
                f"{self.runs}-{i}", prompt(i), params, lora_request=self.requests[i % BUSY]
            )
        tokens: dict[str, list[int]] = {}
        seconds: list[float] = []
        step = 0
        while self.engine.has_unfinished_requests():
            late = before_step(step)
            if late is not None:
                self.engine.add_request(f"{self.runs}-late", prompt(99), params, lora_request=late)
            began = time.perf_counter()
            outputs = self.engine.step()
            seconds.append(time.perf_counter() - began)
            step += 1
            for output in outputs:
                name = output.request_id.partition("-")[2].split("-")[0]
                tokens[name] = list(output.outputs[0].token_ids)
        return tokens, seconds[8:-4]


def timed(name: str, bench: Bench, images: list[Any], pause_s: float | None) -> tuple[Row, Any]:
    """One run, with or without a writer beside it."""
    writer = None
    for slot in range(BUSY, SLOTS):
        bench.slots.spoil(slot)
    if pause_s is not None:
        writer = Writer(bench.slots, images, pause_s)
        writer.start()
    try:
        tokens, seconds = bench.run()
    finally:
        if writer:
            writer.halt.set()
            writer.join()
    row: Row = {
        "run": name,
        "steps": len(seconds),
        "step_median_ms": round(statistics.median(seconds) * 1e3, 3),
        "step_max_ms": round(max(seconds) * 1e3, 3),
    }
    if writer:
        times = sorted(writer.seconds)
        row |= {
            "scatters": len(times),
            "scatter_median_ms": round(statistics.median(times) * 1e3, 3),
            "scatter_p99_ms": round(times[int(len(times) * 0.99)] * 1e3, 3),
            "written_slots": len(writer.last),
            "written_slots_equal": all(
                bench.slots.equals(images[which], slot) for slot, which in writer.last.items()
            ),
        }
    return row, tokens


def published_in_mid_run(bench: Bench, image: Any, model: Any) -> Row:
    """A request whose adapter a thread brings while others decode, against native loading."""
    late, spare, arrives = bench.requests[BUSY], BUSY, 24
    bench.engine.add_lora(late)  # takes the lowest free slot, which is the one used below
    native, _ = bench.run(lambda step: late if step == arrives else None)
    bench.engine.remove_lora(late.lora_int_id)
    bench.slots.spoil(spare)

    def bring() -> None:
        bench.slots.scatter(image, spare)
        bench.slots.publish(late.lora_int_id, spare, model)

    thread = threading.Thread(target=bring, name="bring")

    def before_step(step: int) -> Any | None:
        if step == arrives - 16:
            thread.start()
        if step == arrives:
            thread.join()
            return late
        return None

    ours, seconds = bench.run(before_step)
    bench.slots.unpublish(late.lora_int_id)
    return {
        "same_tokens_late_request": ours["late"] == native["late"],
        "same_tokens_others": sum(ours[name] == native[name] for name in native if name != "late"),
        "step_max_ms": round(max(seconds) * 1e3, 3),
    }


def arguments_of(options: argparse.Namespace) -> Row:
    common: Row = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_loras": SLOTS,
        "max_cpu_loras": 32,
        "max_lora_rank": RANK,
        "enable_prefix_caching": False,
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "seed": 0,
        "async_scheduling": True,
    }
    if options.tiny:
        return common | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "dtype": "float32",
            "max_model_len": 512,
        }
    return common | {
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 40, 64]},
        "kv_cache_memory_bytes": 4 << 30,
        "gpu_memory_utilization": 0.5,
        "dtype": "bfloat16",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--split-k", action="store_true", help="leave vLLM's shrink kernel alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.perf_counter()
    import torch
    import vllm

    if not options.split_k and torch.cuda.is_available():
        one_part_shrink()
    with tempfile.TemporaryDirectory() as scratch:
        model, adapters = files(Path(scratch), BUSY + SPARE, options.tiny)
        llm = vllm.LLM(str(model), **arguments_of(options))
        bench = Bench(llm, adapters, options)
        native = [bench.native_image(request) for request in bench.requests[BUSY:]]
        images = [image for image, _ in native]
        bench.slots.scatter(images[0], BUSY)  # kernels and stream are set up now
        bench.run()
        started = time.perf_counter() - began
        rows, answers = [], []
        for name, pause_s in (
            ("none", None),
            ("none again", None),
            ("every 20 ms", 0.02),
            ("back to back", 0.0),
        ):
            row, tokens = timed(name, bench, images, pause_s)
            rows.append(row)
            answers.append(tokens)
            row["same_tokens"] = sum(tokens[name] == answers[0][name] for name in answers[0])
            print(json.dumps(row), flush=True)
        publish = published_in_mid_run(bench, *native[0])
        print(json.dumps(publish), flush=True)
        distinct = len({tuple(tokens) for tokens in answers[0].values()})
        raw = {
            "command": "python3 -m benchmarks.gpu.spike_scatter " + " ".join(sys.argv[1:]),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "runner": f"{type(bench.runner).__module__}.{type(bench.runner).__name__}",
            "async_scheduling": bench.async_scheduling,
            "image_bytes": bench.slots.nbytes,
            "slot_tensors": len(bench.slots.targets[0]),
            "distinct_answers": distinct,
            "split_k_of_one": not options.split_k,
            "rows": rows,
            "publish": publish,
            "setup_s": round(started, 1),
            "total_s": round(time.perf_counter() - began, 1),
        }
    print(json.dumps({key: value for key, value in raw.items() if key != "rows"}))
    if options.json:
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    good = publish["same_tokens_late_request"] and all(
        row["same_tokens"] == options.requests and row.get("written_slots_equal", True)
        for row in rows
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
