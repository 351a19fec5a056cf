"""How to start vLLM for many adapters: from configuration, adapters and traffic alone."""

from lora_cache.plan.adapters import Adapters, in_directory, of_ranks
from lora_cache.plan.budget import Budget, EngineSettings, make_budget
from lora_cache.plan.choice import Option, Verdict
from lora_cache.plan.explain import explain
from lora_cache.plan.model import Model, read_model
from lora_cache.plan.plan import Plan, Wishes, make_plan
from lora_cache.plan.ranks import Ranks
from lora_cache.plan.slots import MAX_LORA_RANKS, SlotCost, SlotSettings, slot_cost
from lora_cache.plan.traffic import Traffic

__all__ = [
    "MAX_LORA_RANKS",
    "Adapters",
    "Budget",
    "EngineSettings",
    "Model",
    "Option",
    "Plan",
    "Ranks",
    "SlotCost",
    "SlotSettings",
    "Traffic",
    "Verdict",
    "Wishes",
    "explain",
    "in_directory",
    "make_budget",
    "make_plan",
    "of_ranks",
    "read_model",
    "slot_cost",
]
