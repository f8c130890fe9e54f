"""`codecllm bench`: speed and memory of a container's residencies on this machine."""

from codecllm.bench.bench import BenchOptions, Row, bench

__all__ = ["BenchOptions", "Row", "bench"]
