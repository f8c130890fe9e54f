"""Why the output is garbage: five stages from the bytes to the text, and one paragraph that says what is wrong and where.

| module            | stage                                                                            |
|-------------------|----------------------------------------------------------------------------------|
| `round_trip`      | the source, quantized and encoded again, against the container; the decode back ends |
| `quantization`    | errors and sizes: one scale per tensor against one per channel; NaN, zero, extreme |
| `loaded_model`    | modules and weights of the loaded model against what the verifier computes itself  |
| `layer_outputs`   | hidden states, layer by layer, then module, then channel                          |
| `text`            | text, divergence and perplexity of source and loaded model                        |
"""

from __future__ import annotations

from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.diagnosis import DiagnoseOptions, diagnose
from codecllm.verifier.diagnosis.rendering import render_diagnosis
from codecllm.verifier.diagnosis.report.html_report import render_html, write_html

__all__ = ["Cause", "DiagnoseOptions", "diagnose", "render_diagnosis", "render_html", "write_html"]
