"""The pure planner: which adapter is where, who waits, who goes."""

from lora_cache.planner.actions import (
    DRAIN_AFTER_S,
    Action,
    Choice,
    Counters,
    Granted,
    Holdings,
    Limits,
    Refused,
    Resized,
    Start,
    Transition,
    Want,
)
from lora_cache.planner.planner import Planner

__all__ = [
    "DRAIN_AFTER_S",
    "Action",
    "Choice",
    "Counters",
    "Granted",
    "Holdings",
    "Limits",
    "Planner",
    "Refused",
    "Resized",
    "Start",
    "Transition",
    "Want",
]
