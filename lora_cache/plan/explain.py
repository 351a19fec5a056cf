"""The arithmetic of a plan, line by line: what ``plan --explain`` prints."""

from __future__ import annotations

from collections.abc import Iterator

from lora_cache.plan.budget import CONTEXT_BYTES
from lora_cache.plan.model import ITEM_BYTES
from lora_cache.plan.plan import HEADROOM, Plan


def explain(plan: Plan) -> Iterator[str]:
    """Yield the lines; two blanks in front of what belongs to the line above."""
    yield from _slot(plan)
    yield from _weights(plan)
    yield from _kv(plan)
    yield from _gpu(plan)
    yield from _traffic(plan)
    yield from _tiers(plan)


def _slot(plan: Plan) -> Iterator[str]:
    slots, cost = plan.wishes.slots, plan.budget.slots
    sharded = ", fully sharded" if slots.fully_sharded else ""
    yield (
        f"a slot{_each(slots.tp)}: rank {slots.max_lora_rank}, numbers of "
        f"{cost.item_bytes} bytes ({slots.dtype(plan.model)}){sharded}"
    )
    for layer, nbytes in cost.parts:
        tensors = layer.tensors(slots.max_lora_rank, slots.tp, sharded=slots.fully_sharded)
        copies = f"{layer.copies} experts × " if layer.copies > 1 else ""
        flags = f" + {layer.flag_bytes} bytes" if layer.flag_bytes else ""
        numbers = f"{copies}(A {_shapes(tensors.a)}, B {_shapes(tensors.b)})"
        yield (
            f"  {layer.name}: {layer.number} × ({numbers} × {cost.item_bytes}{flags}) "
            f"= {nbytes:,} bytes"
        )
    yield f"  bytes_per_slot = {cost.bytes_per_slot:,}"
    yield f"  beside all slots: {cost.fixed_bytes:,} bytes (flags, indices of a batch)"


def _weights(plan: Plan) -> Iterator[str]:
    model, tp = plan.model, plan.wishes.slots.tp
    item, quantized = ITEM_BYTES[model.dtype], model.quantization
    about = "about " if model.is_estimate else ""
    yield f"weights{_each(tp)} = {about}{plan.budget.weight_bytes:,} bytes"
    for layer in model.layers:
        if weights := layer.weights(tp):
            size = f"{quantized.bits / 8:g}" if layer.quantizes else str(item)
            more = f" + {biases:,} in biases × {item}" if (biases := layer.biases(tp)) else ""
            yield f"  {layer.name}: {weights:,} numbers × {size} bytes{more}"
    yield f"  norms: {model.shape.vectors:,} × {item}"


def _kv(plan: Plan) -> Iterator[str]:
    shape, tp = plan.model.shape, plan.wishes.slots.tp
    heads = max(1, shape.kv_heads // tp)
    item = plan.budget.kv_bytes_per_token // (2 * shape.decoder_layers * heads * shape.head)
    yield (
        f"KV cache per token = 2 (keys, values) × {shape.decoder_layers} layers × {heads} of "
        f"{shape.kv_heads} heads × {shape.head} × {item} bytes = "
        f"{plan.budget.kv_bytes_per_token:,} bytes"
    )


def _gpu(plan: Plan) -> Iterator[str]:
    budget, engine = plan.budget, plan.wishes.engine
    given = engine.gpu_memory_utilization is not None
    yield (
        f"vLLM's share = {budget.gpu_bytes:,} × {budget.utilization:g} = "
        f"{budget.vllm_bytes:,} bytes" + (" (given)" if given else "")
    )
    yield f"  outside it: {CONTEXT_BYTES:,} bytes for the CUDA context"
    how = "given" if engine.working_bytes is not None else "an estimate"
    yield (
        f"  to work: {budget.working_bytes:,} bytes ({how}): a batch of "
        f"{engine.max_num_batched_tokens:,} tokens or {engine.max_num_seqs:,} sequences, and CUDA "
        "graphs"
    )
    staging = ""
    if budget.staging_bytes:
        staging = f" − staging {budget.staging_bytes:,}"
        yield f"  staging, for an adapter on its way into a slot: {budget.staging_bytes:,} bytes"
    if (chosen := plan.chosen) is not None:
        yield (
            f"  KV cache = {budget.vllm_bytes:,} − weights {budget.weight_bytes:,} − to work "
            f"{budget.working_bytes:,} − {chosen.max_loras} slots {chosen.slot_bytes:,}{staging} = "
            f"{chosen.kv_bytes:,} bytes (in blocks of 16 tokens) = {chosen.kv_tokens:,} tokens"
        )


def _traffic(plan: Plan) -> Iterator[str]:
    traffic, wishes = plan.traffic, plan.wishes
    yield (
        f"traffic: {traffic.requests:,} requests for {traffic.adapters:,} adapters, "
        f"{traffic.rate:.3g} a second, {traffic.tokens_in_flight:,.0f} tokens in flight"
    )
    yield (
        f"  KV cache needed = the larger of {HEADROOM:g} × that and one context of "
        f"{wishes.engine.max_model_len:,} = {plan.needed_tokens:,} tokens"
    )
    yield (
        f"  of the numbers of slots that leave so much, the fewest with waits of up to "
        f"{wishes.target_wait_s * 1000:g} ms on average"
    )


def _tiers(plan: Plan) -> Iterator[str]:
    adapters, tp = plan.adapters, plan.wishes.slots.tp
    copies = f" × {plan.copies:.3g}, over {tp} GPUs" if tp > 1 else ""
    place = "" if plan.wishes.engine.resident else "; one place more, to load into"
    yield (
        f"host memory: {plan.host_entries:,} adapters × {adapters.host_bytes:,} bytes on average"
        f"{copies}{place}"
    )
    yield f"disk: {adapters.disk_bytes:,} bytes an adapter, with a fifth to spare"


def _each(tp: int) -> str:
    return f" on each of {tp} GPUs" if tp > 1 else ""


def _shapes(shapes: tuple[tuple[int, int], ...]) -> str:
    """``((16, 4096), (16, 4096))`` → ``2 × 16 × 4096``; other shapes one after the other."""
    parts = []
    for shape in dict.fromkeys(shapes):
        times = f"{shapes.count(shape)} × " if shapes.count(shape) > 1 else ""
        parts.append(f"{times}{shape[0]} × {shape[1]}")
    return " + ".join(parts)
