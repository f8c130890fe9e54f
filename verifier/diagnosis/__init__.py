"""Why the output is wrong: five stages from the bytes to the text, and a conclusion.

| module         | stage                                                                       |
|----------------|-----------------------------------------------------------------------------|
| `round_trip`   | the source, quantized and encoded again, against the container; back ends   |
| `quantization` | errors and sizes: one scale per tensor or per channel; NaN, zero, extreme   |
| `loaded_model` | modules and weights of the loaded model against weights of the verifier     |
| `layer_outputs`| hidden states, layer by layer, then module, then channel                    |
| `text`         | text, divergence and perplexity of source and loaded model                  |
"""

from __future__ import annotations

from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.diagnosis import diagnose
from codecllm.verifier.diagnosis.options import DiagnoseOptions
from codecllm.verifier.diagnosis.rendering import render_diagnosis
from codecllm.verifier.diagnosis.report.html_report import render_html, write_html

__all__ = [
    "Cause",
    "DiagnoseOptions",
    "diagnose",
    "render_diagnosis",
    "render_html",
    "write_html",
]
