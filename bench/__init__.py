"""Benchmarks: every number beside its limit, measured in the same run. See __main__.py."""
