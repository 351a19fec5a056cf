"""Every policy keeps the contract: notified, then asked, and asking changes nothing."""

from __future__ import annotations

import math

from lora_cache.policies import FIFO, GDSF, LFU, LRU, LRUK, SLRU, Auto, Policy, Sieve
from lora_cache.testing import RandomPolicy
from lora_cache.testing.policy_contract import PolicyContract


class TestAuto(PolicyContract):
    def make_policy(self) -> Policy:
        return Auto()


class TestFIFO(PolicyContract):
    def make_policy(self) -> Policy:
        return FIFO()


class TestGDSF(PolicyContract):
    def make_policy(self) -> Policy:
        return GDSF()


class TestLFU(PolicyContract):
    def make_policy(self) -> Policy:
        return LFU()


class TestPlainLFU(PolicyContract):
    def make_policy(self) -> Policy:
        return LFU(math.inf)


class TestLRU(PolicyContract):
    def make_policy(self) -> Policy:
        return LRU()


class TestLRUK(PolicyContract):
    def make_policy(self) -> Policy:
        return LRUK()


class TestLRUKWithShortHistory(PolicyContract):
    def make_policy(self) -> Policy:
        return LRUK(history=2)


class TestSLRU(PolicyContract):
    def make_policy(self) -> Policy:
        return SLRU()


class TestSieve(PolicyContract):
    def make_policy(self) -> Policy:
        return Sieve()


class TestRandom(PolicyContract):
    def make_policy(self) -> Policy:
        return RandomPolicy(seed=7)
