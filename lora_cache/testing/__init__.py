"""Public fakes for tests of policies, engines and applications.  No vLLM, no torch."""

from lora_cache.testing.policies import RandomPolicy

__all__ = ["RandomPolicy"]
