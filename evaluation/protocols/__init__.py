"""Protocols and benchmarks."""
