"""Seconds that pass when a test says so."""

from __future__ import annotations


class Seconds:
    def __init__(self) -> None:
        self.passed = 0.0

    def now(self) -> float:
        return self.passed

    def advance(self, seconds: float) -> None:
        self.passed += seconds
