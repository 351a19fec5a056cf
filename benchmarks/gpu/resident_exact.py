"""The resident engine on a GPU: are slots and answers those of vLLM's own loading?

    python3 -m benchmarks.gpu.resident_exact --json OUT     (GPU, shapes of Llama-3.1-8B)
    python3 -m benchmarks.gpu.resident_exact --tiny         (CPU, half a minute)

One engine, first as vLLM manages it: for every adapter the answers to two prompts, and for some the
content of the slot.  A second pass in other batches says how far stock vLLM is from itself; with
`--stock-seconds` the arrivals of the next step, too, served by its own loading.  Then a cache
attaches, and requests arrive at random, by popularity, for `--seconds`: more adapters than
slots, and than fit in host memory, so they come and go all the time while others decode.  Every
answer is compared with vLLM's, its tokens and the log probabilities of the five likeliest.  At the
end some adapters are leased, and their slots compared number for number.

Without batch invariance answers differ in their last bits, whoever loads, because batches do; some
are then *nearer to another* adapter's than to their own, by the log probabilities of the likeliest
tokens up to where the answers part.  That must be as rare as it is for stock vLLM under the same
arrivals.  For control, the answers of each adapter are judged as if they were the next one's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.rig import write_files
from benchmarks.gpu.spike_scatter import one_part_shrink
from lora_cache.bench.servers import Row

Question = tuple[int, int]  # adapter, prompt

PROMPTS = 2
LOGPROBS = 5
CHECKED_SLOTS = 12
FIRST_ID = 1 << 29  # below those of the cache


def prompt(number: int, tiny: bool) -> Any:
    vocabulary = 400 if tiny else 100_000
    return {"prompt_token_ids": [(number * 7919 + i * 104729) % vocabulary for i in range(64)]}


class Answer(NamedTuple):
    """The tokens, and of each step the likeliest ones with their log probabilities."""

    tokens: list[int]
    logprobs: list[dict[int, float]]

    @classmethod
    def of(cls, output: Any) -> Answer:
        found = [{t: p.logprob for t, p in step.items()} for step in output.logprobs]
        return cls(list(output.token_ids), found)


Answers = dict[Question, Answer]


class Rig:
    """One engine, its adapters and its slots."""

    def __init__(self, llm: Any, adapters: list[Path], options: argparse.Namespace) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self.llm, self.adapters, self.options = llm, adapters, options
        core = llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.async_scheduling = core.vllm_config.scheduler_config.async_scheduling
        self.manager = self.runner.lora_manager._adapter_manager
        self.params = SamplingParams(
            temperature=0,
            max_tokens=options.tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=LOGPROBS,
        )
        self.requests = [
            LoRARequest(lora_name=f"native-{i}", lora_int_id=FIRST_ID + i, lora_path=str(path))
            for i, path in enumerate(adapters)
        ]

    def slot(self, index: int) -> list[Any]:
        """Every stacked tensor of a slot, copied to the CPU."""
        import torch

        found, seen = [], set()
        for module in self.manager.modules.values():
            for name in ("lora_a_stacked", "lora_b_stacked"):
                held = getattr(module, name, ())
                for tensor in (held,) if isinstance(held, torch.Tensor) else held:
                    if tensor.data_ptr() not in seen:
                        seen.add(tensor.data_ptr())
                        found.append(tensor[index].cpu().clone())
        return found

    def native_slot(self, adapter: int) -> list[Any]:
        request = self.requests[adapter]
        self.llm.llm_engine.add_lora(request)
        held = self.slot(self.manager.lora_index_to_id.index(request.lora_int_id))
        self.llm.llm_engine.remove_lora(request.lora_int_id)
        return held

    def native_answers(self, order: Iterable[Question]) -> Answers:
        """VLLM's own answers, as many adapters at a time as there are slots."""
        found: Answers = {}
        questions = list(order)
        for start in range(0, len(questions), self.options.slots):
            group = questions[start : start + self.options.slots]
            outputs = self.llm.generate(
                [prompt(which, self.options.tiny) for _, which in group],
                self.params,
                lora_request=[self.requests[adapter] for adapter, _ in group],
                use_tqdm=False,
            )
            for question, output in zip(group, outputs, strict=True):
                found[question] = Answer.of(output.outputs[0])
        return found


def shared(one: list[int], other: list[int]) -> int:
    """How many first tokens two answers share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def distance(one: Answer, other: Answer) -> float:
    """How far apart: the most by which a log probability differs, up to the first other token.

    A token that is among the likeliest of one answer alone counts as one that is far off.
    """
    agreed = shared(one.tokens, other.tokens)
    found = 0.0
    for a, b in zip(one.logprobs[: agreed + 1], other.logprobs[: agreed + 1], strict=True):
        differences = sorted(abs(a[token] - b[token]) for token in a.keys() & b.keys())
        found = max(found, differences[-1] if len(differences) >= LOGPROBS - 1 else 10.0)
    return found


def judge(answers: list[tuple[Question, Answer]], expected: Answers) -> Row:
    """How many are equal, to the last bit of the log probabilities, and how many are another's."""
    equal = bits = nearer = 0
    for (adapter, which), answer in answers:
        own = expected[adapter, which]
        equal += answer.tokens == own.tokens
        bits += answer == own
        if answer != own:
            others = (e for (a, w), e in expected.items() if w == which and a != adapter)
            nearest = min((distance(answer, other) for other in others), default=float("inf"))
            nearer += nearest < distance(answer, own)
    return {
        "answers": len(answers),
        "equal": equal,
        "logprobs_equal": bits,
        "nearer_to_another": nearer,
    }


class Arrivals(NamedTuple):
    """What came of requests that arrived at random."""

    answers: list[tuple[Question, Answer]]
    waits_s: list[float]
    seconds: float


async def at_random(rig: Rig, cache: Any, seconds: float) -> Arrivals:
    """Requests arrive by a Poisson process, for adapters by their popularity."""
    options = rig.options
    rng = random.Random(options.seed)
    weights = [(rank + 1) ** -0.8 for rank in range(len(rig.adapters))]
    answers: list[tuple[Question, Answer]] = []
    waits: list[float] = []

    async def ask(adapter: int, which: int) -> None:
        began = time.monotonic()
        first = final = None
        async for output in cache.generate(
            prompt(which, options.tiny), rig.params, rig.adapters[adapter]
        ):
            first = first or time.monotonic() - began
            final = output.outputs[0]
        waits.append(first or 0.0)
        answers.append(((adapter, which), Answer.of(final)))

    await cache.prefetch(rig.adapters, tier="disk")
    tasks: set[asyncio.Task[None]] = set()
    due = began = time.monotonic()
    while (due := due + rng.expovariate(options.rate)) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        (adapter,) = rng.choices(range(len(rig.adapters)), weights)
        task = asyncio.create_task(ask(adapter, rng.randrange(PROMPTS)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return Arrivals(answers, sorted(waits), time.monotonic() - began)


async def stock(rig: Rig, expected: Answers) -> Row:
    """VLLM's own loading under such arrivals: its batches are then of other sizes, too."""
    from lora_cache import AsyncLoraCache

    async with AsyncLoraCache(rig.llm, engine="stock", policy="lru", publish=False) as cache:
        found = await at_random(rig, cache, rig.options.stock_seconds)
    return judge(found.answers, expected) | {"seconds": round(found.seconds, 1)}


async def soak(rig: Rig, expected: Answers, native: dict[int, list[Any]]) -> tuple[Row, Row]:
    """Random arrivals through the cache; then the slots of some adapters."""
    import torch

    from lora_cache import AsyncLoraCache

    async with AsyncLoraCache(rig.llm, engine="resident", policy="lru", publish=False) as cache:
        answers, waits, seconds = await at_random(rig, cache, rig.options.seconds)
        slots_equal = 0
        for adapter, held in native.items():
            async with cache.lease(rig.adapters[adapter]) as lease:
                (slot,) = [s for s, key in cache._engine.slots().items() if key == lease.key]
                slots_equal += all(map(torch.equal, rig.slot(slot), held))
        slots: Row = {"adapters": len(native), "tensors": len(held), "equal": slots_equal}
        control = rig.slot(slot)
        control[0].view(-1)[0] += 1
        slots["a_changed_number_is_seen"] = not all(map(torch.equal, control, held))
        drift = await cache.reconcile()
        stats = cache.stats()
        engine: Any = cache._engine
        row: Row = judge(answers, expected) | {
            "seconds": round(seconds, 1),
            "adapters_used": len({adapter for (adapter, _), _ in answers}),
            "activations": stats.activations,
            "slot_hits": stats.slot_hits,
            "host_hits": stats.host_hits,
            "disk_hits": stats.disk_hits,
            "load_failures": stats.load_failures,
            "drift": drift + stats.drift,
            "displaced": engine.displaced,
            "not_packed": engine.unpacked,
            "load_parts_ms": {
                name: round(1e3 * statistics.median(getattr(t, name) for t in engine.load_times), 2)
                for name in ("examined", "packed", "locked", "commanded", "copied", "scattered")
            },
            "mean_load_ms": round(1e3 * stats.load_s / max(1, stats.activations), 2),
            "first_token_p50_ms": round(1e3 * waits[len(waits) // 2], 1),
            "first_token_p99_ms": round(1e3 * waits[int(len(waits) * 0.99)], 1),
        }
    return row, slots


def measure(options: argparse.Namespace, root: Path) -> Row:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["LORA_CACHE_RESIDENT"] = "1"
    from lora_cache.engines.resident.plugin import register

    register()  # where the package is not installed, vLLM does not find the entry point
    model, adapters = write_files(root, options.adapters, tiny=options.tiny)
    import torch
    import vllm

    if not options.tiny and not options.split_k:
        one_part_shrink()
    arguments: Row = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "enable_lora": True,
        "max_loras": options.slots,
        "max_cpu_loras": options.host,
        "max_lora_rank": 16,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if options.tiny:
        arguments |= {"enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    else:
        arguments |= {
            "enforce_eager": options.eager,
            "dtype": "bfloat16",
            "kv_cache_memory_bytes": 4 << 30,
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]},
        }
    began = time.monotonic()
    rig = Rig(vllm.LLM(**arguments), adapters, options)
    started_s = time.monotonic() - began
    rng = random.Random(options.seed)
    checked = rng.sample(range(options.adapters), min(CHECKED_SLOTS, options.adapters))
    native = {adapter: rig.native_slot(adapter) for adapter in checked}
    questions = [
        (adapter, which) for adapter in range(options.adapters) for which in range(PROMPTS)
    ]
    expected = rig.native_answers(questions)
    again = rng.sample(questions, min(len(questions), 8 * options.slots))
    itself = judge(list(rig.native_answers(again).items()), expected)
    print(json.dumps({"start_s": round(started_s, 1), "stock_against_itself": itself}), flush=True)
    neighbours = [
        (((adapter + 1) % options.adapters, which), answer)
        for (adapter, which), answer in expected.items()
    ]
    control = judge(neighbours, expected)
    by_stock = asyncio.run(stock(rig, expected)) if options.stock_seconds else None
    print(json.dumps({"stock_at_random": by_stock}), flush=True)
    resident, slots = asyncio.run(soak(rig, expected, native))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "runner": f"{type(rig.runner).__module__}.{type(rig.runner).__qualname__}",
        "async_scheduling": rig.async_scheduling,
        "batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT") == "1",
        "eager": options.eager,
        "split_k_of_one": not options.split_k,
        "slots_of_vllm": options.slots,
        "adapters": options.adapters,
        "adapters_in_host_memory": options.host,
        "distinct_answers": len({tuple(answer.tokens) for answer in expected.values()}),
        "stock_against_itself": itself,
        "control": control,
        "stock_at_random": by_stock,
        "resident_against_stock": resident,
        "slot_tensors": slots,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--host", type=int, default=60, help="max_cpu_loras")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--stock-seconds", type=float, default=0, help="the same for stock vLLM")
    parser.add_argument("--rate", type=float, default=10, help="requests a second")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no graphs: vLLM starts sooner")
    parser.add_argument("--split-k", action="store_true", help="leave vLLM's shrink kernel alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = f"python3 -m benchmarks.gpu.resident_exact {' '.join(sys.argv[1:])}"
    with tempfile.TemporaryDirectory() as directory:
        row: Row = {"command": command} | measure(options, Path(directory))
        print(json.dumps(row, indent=1), flush=True)
        if options.json:  # before the files are removed, which takes seconds
            options.json.write_text(json.dumps(row, indent=1) + "\n")
    return 0 if is_good(row) else 1


def is_good(row: Row) -> bool:
    """Whether the resident engine is no further from stock vLLM than that is from itself."""
    slots, resident = row["slot_tensors"], row["resident_against_stock"]
    good = slots["equal"] == slots["adapters"] and slots["a_changed_number_is_seen"]
    if row["batch_invariant"] or row["stock_at_random"] is None:
        near = resident["logprobs_equal"] == resident["answers"]
    else:
        by_stock = row["stock_at_random"]
        share = resident["nearer_to_another"] / resident["answers"]
        near = share <= 1.5 * by_stock["nearer_to_another"] / by_stock["answers"] + 0.01
    return bool(good and near and not resident["not_packed"])


if __name__ == "__main__":
    sys.exit(main())
