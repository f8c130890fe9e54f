"""Parts that the benchmarks share: floors, peak memory, rows and turns, models of random weights."""
