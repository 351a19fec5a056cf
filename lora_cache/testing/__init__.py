"""Public fakes for tests of policies, engines and applications.  No vLLM, no torch."""

from lora_cache.testing.clock import ManualClock, settle
from lora_cache.testing.engine import FakeEngine, FakeOutput
from lora_cache.testing.policies import RandomPolicy
from lora_cache.testing.source import FakeSource

__all__ = ["FakeEngine", "FakeOutput", "FakeSource", "ManualClock", "RandomPolicy", "settle"]
