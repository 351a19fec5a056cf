"""Start a vLLM that all servers of a measurement share."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import Any

from lora_cache.engines import SWITCH

#: Steps of about as many tokens are replayed from a CUDA graph.  Coarser than vLLM's own list, for
#: each takes a part of a second to capture.
_GRAPH_SIZES = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512),
    *(576, 640, 704, 768, 1024, 1536, 2048),
)


def start_vllm(
    model: Path,
    *,
    slots: int,
    host: int,
    rank: int,
    max_num_seqs: int,
    max_model_len: int,
    kv_bytes: int,
    on_cpu: bool,
    graph_tokens: int | None = None,
) -> Any:
    """An `AsyncLLM` with dummy weights, whose slots a cache may take over.

    Args:
        model: a directory with a ``config.json``.
        host: ``max_cpu_loras``.
        rank: the highest.
        kv_bytes: of the KV cache.
        on_cpu: without graphs, in float32.
        graph_tokens: CUDA graphs are captured for steps of at most so many tokens, 2,048 being the
            most; None: as vLLM does, twice `max_num_seqs` and at most 512.
    """
    os.environ[SWITCH] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": kv_bytes,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": host,
        "max_lora_rank": rank,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    if on_cpu:
        arguments |= {"enforce_eager": True, "dtype": "float32"}
    else:
        most = graph_tokens or min(2 * max_num_seqs, 512)
        sizes = [size for size in _GRAPH_SIZES if size <= most]
        arguments |= {
            "dtype": "bfloat16",
            "compilation_config": {"cudagraph_capture_sizes": sizes},
        }
    # As `vllm serve` does it: or every full collection looks through all that was imported, and
    # everybody waits for it.
    gc.collect()
    gc.freeze()
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def prompt(rng: random.Random, length: int, vocabulary: int) -> Any:
    """Random tokens below `vocabulary`."""
    return {"prompt_token_ids": rng.choices(range(2, vocabulary), k=length)}


def sampling(tokens: int) -> Any:
    """`vllm.SamplingParams` of an answer that has as many tokens, each sent when it is there."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
