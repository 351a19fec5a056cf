"""Replays traffic through the planner and the policies that serve: no GPU, no vLLM."""

from lora_cache.sim.belady import Belady, Future, next_uses
from lora_cache.sim.cost import RESIDENT, TYPICAL_NBYTES, TransferCost
from lora_cache.sim.hold import Hold, parse_hold
from lora_cache.sim.rows import Row
from lora_cache.sim.setup import Setup
from lora_cache.sim.simulate import simulate
from lora_cache.sim.sources import open_trace
from lora_cache.sim.trace import FileTrace, Request, Trace

__all__ = [
    "RESIDENT",
    "TYPICAL_NBYTES",
    "Belady",
    "FileTrace",
    "Future",
    "Hold",
    "Request",
    "Row",
    "Setup",
    "Trace",
    "TransferCost",
    "next_uses",
    "open_trace",
    "parse_hold",
    "simulate",
]
