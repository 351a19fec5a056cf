"""What somebody who pastes the plan should know before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_cache.plan.slots import served_names, slot_cost, smallest_rank

if TYPE_CHECKING:
    from lora_cache.plan.plan import Plan

_WASTE = 0.3  # of a slot, from which on padding is worth a word
_FEW = 0.2  # of the adapters, who make all others' slots larger
_SHOWN = 3
#: vLLM's own limit of CUDA graphs, or twice max_num_seqs if that is less (0.32 has 1,024 on
#: data-center Blackwell).
_GRAPH_TOKENS = 512


def warnings_of(plan: Plan) -> Iterator[str]:
    """One sentence each, what matters most first."""
    yield from _fit(plan)
    yield from _graphs(plan)
    yield from _estimates(plan)
    yield from _padding(plan)
    yield from _modules(plan)
    yield from _tiers(plan)


def _fit(plan: Plan) -> Iterator[str]:
    budget, engine = plan.budget, plan.wishes.engine
    left = budget.kv_tokens(plan.options[0].max_loras)
    if plan.chosen is None:
        needs = budget.weight_bytes + budget.working_bytes
        yield (
            f"nothing fits: weights and room to work take {_gib(needs)} of vLLM's "
            f"{_gib(budget.vllm_bytes)}, and what is left holds {left:,} tokens of context, less "
            f"than one of {engine.max_model_len:,}: use more or larger GPUs, quantized weights, or "
            "a smaller --max-model-len"
        )
    elif plan.chosen.kv_tokens < plan.needed_tokens:
        yield (
            f"the traffic needs {plan.needed_tokens:,} tokens of KV cache (twice what runs at a "
            f"time), and {plan.chosen.kv_tokens:,} are left: requests will wait for it; use more "
            "or larger GPUs, or --kv-cache-dtype fp8"
        )
    elif plan.chosen.wait_s > plan.wishes.target_wait_s:
        yield (
            f"requests wait {_ms(plan.chosen.wait_s)} for their adapter on average, more than the "
            f"{_ms(plan.wishes.target_wait_s)} aimed at: no number of slots that fits does better"
        )
    if plan.traffic.longest > engine.max_model_len:
        yield (
            f"the longest request has {plan.traffic.longest:,} tokens, and contexts end at "
            f"{engine.max_model_len:,}"
        )
    if plan.model.max_len and engine.max_model_len > plan.model.max_len:
        yield f"the model was made for contexts of up to {plan.model.max_len:,} tokens"


def _estimates(plan: Plan) -> Iterator[str]:
    model = plan.model
    if model.like:
        yield (
            f"{model.architecture} is reckoned as {model.like}: every figure is an estimate, the "
            "size of a slot too"
        )
    elif model.quantization.is_estimate:
        yield (
            f"the weights are quantized ({model.quantization.name}): their size is an estimate, "
            f"at {model.quantization.bits:.3g} bits each; that of slots is exact"
        )
    if model.shape.sliding:
        yield (
            "some layers look back over a window only and need less KV cache than is reckoned here"
        )


def _padding(plan: Plan) -> Iterator[str]:
    ranks, slots = plan.adapters.ranks, plan.wishes.slots
    if plan.adapters.is_assumed:
        yield (
            f"nothing is known of the adapters: rank {ranks.largest} on all linear layers is "
            "assumed; name them with --adapters or --rank"
        )
    for rank, share in ranks.shares[:_SHOWN]:
        waste = 1 - rank / slots.max_lora_rank
        if waste >= _WASTE:
            yield (
                f"rank {rank} in slots of rank {slots.max_lora_rank}: {waste:.1%} of each such "
                f"slot is padding ({share:.0%} of the adapters)"
            )
    rest = ranks.without_largest()
    if rest is not None and (few := ranks.shares[-1][1]) <= _FEW:
        smaller = smallest_rank(rest.largest)
        if smaller < slots.max_lora_rank:
            # Everything but flags and indices grows with the rank.
            cost = slot_cost(plan.model, replace(slots, max_lora_rank=smaller)).bytes_per_slot
            yield (
                f"{few:.0%} of the adapters have rank {ranks.largest}; without them rank {smaller} "
                f"would do, and a slot would take {_gib(cost)} instead of "
                f"{_gib(plan.budget.slots.bytes_per_slot)}: serve them elsewhere, or reduce them"
            )


def _modules(plan: Plan) -> Iterator[str]:
    targets, cost = plan.adapters.targets, plan.budget.slots
    vocabulary = ("embed_tokens", "lm_head")
    unused = cost.of(vocabulary)
    if plan.wishes.slots.target_modules is None and unused and not _used(targets, vocabulary):
        share = unused / cost.bytes_per_slot
        yield (
            f"{share:.0%} of each slot ({_gib(unused)}) is for embed_tokens and lm_head, which "
            f"{'no adapter here has' if targets else 'few adapters have'}: leave them out with "
            "--lora-target-modules (vLLM then ignores such parts of later adapters, silently)"
        )
    if targets is not None:
        served = served_names(plan.model, plan.wishes.slots.target_modules)
        if missing := sorted(set(targets) - served):
            yield (
                f"adapters have weights for {', '.join(missing)}, which vLLM does not serve with "
                "these settings: it refuses or ignores them"
            )
    refused = plan.adapters.refused
    for name, reason in refused[:_SHOWN]:
        yield f"{name} cannot be served and is not counted: {reason}"
    if len(refused) > _SHOWN:
        yield f"and {len(refused) - _SHOWN} more cannot be served"


def _tiers(plan: Plan) -> Iterator[str]:
    count = max(plan.adapters.count or 0, plan.traffic.adapters)
    if plan.host_entries < count:
        yield (
            f"host memory of {_gib(plan.wishes.host_bytes)} holds {plan.host_entries:,} of "
            f"{count:,} adapters: the others are read from disk when they are asked for"
        )


def _graphs(plan: Plan) -> Iterator[str]:
    captured = min(2 * plan.wishes.engine.max_num_seqs, _GRAPH_TOKENS)
    if plan.traffic.long_prompt > captured:
        yield (
            f"one prompt in ten has {plan.traffic.long_prompt:,} tokens or more, and vLLM captures "
            f"CUDA graphs for steps of up to {captured}: longer ones are launched kernel by "
            "kernel, which made first tokens take three times as long on an H100; have it capture "
            "more with --compilation-config and cudagraph_capture_sizes (docs/performance.md)"
        )


def _used(targets: tuple[str, ...] | None, names: tuple[str, ...]) -> bool:
    return targets is not None and bool(set(targets) & set(names))


def _gib(nbytes: int) -> str:
    size = nbytes / (1 << 30)
    return f"{size:.2f} GiB" if size >= 1 else f"{nbytes / (1 << 20):.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
