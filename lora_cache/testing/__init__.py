"""Public fakes for tests of policies, engines and applications.  No vLLM, no torch.

The tests that a policy must pass are in `lora_cache.testing.policy_contract`: they alone need
pytest and Hypothesis.
"""

from lora_cache.testing.clock import ManualClock, settle
from lora_cache.testing.engine import FakeEngine, FakeOutput
from lora_cache.testing.nvml import FakeGpu, FakeMig, FakeNvml
from lora_cache.testing.policies import RandomPolicy
from lora_cache.testing.source import FakeSource

__all__ = [
    "FakeEngine",
    "FakeGpu",
    "FakeMig",
    "FakeNvml",
    "FakeOutput",
    "FakeSource",
    "ManualClock",
    "RandomPolicy",
    "settle",
]
