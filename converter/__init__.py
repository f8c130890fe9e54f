"""Source model (a folder of safetensors) -> container.

Numpy only: the model is never built, never in memory whole.
"""

from codecllm.converter.conversion import convert, convert_model
from codecllm.converter.options import ConvertOptions, Rate
from codecllm.converter.plan.choice import ParamsChoice
from codecllm.converter.rate.estimate import estimate
from codecllm.converter.report import ConversionReport

__all__ = [
    "ConversionReport",
    "ConvertOptions",
    "ParamsChoice",
    "Rate",
    "convert",
    "convert_model",
    "estimate",
]
