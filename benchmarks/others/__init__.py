"""Other tools' quantizers and compressors, which the benchmarks compare codecllm with."""
