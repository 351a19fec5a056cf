"""Measuring: servers to compare, streams of requests, and the figures of what came back."""
