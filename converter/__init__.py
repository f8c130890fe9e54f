"""Source model (a folder of safetensors) -> container. Numpy only: the model is never built, never in memory whole."""

from codecllm.converter.conversion import ConversionReport, ConvertOptions, convert
from codecllm.converter.rate.estimate import estimate

__all__ = ["ConversionReport", "ConvertOptions", "convert", "estimate"]
