"""Checks and diagnosis: structure, checksums, decoding, ratio, source and baseline.

Importing this package is light: torch and transformers are imported by the checks that decode or
run a model.
"""

from __future__ import annotations

from codecllm.verifier.baseline.baseline import BaselineOutcome, record_baseline
from codecllm.verifier.rendering import render_report
from codecllm.verifier.report import Finding, Report, Stage, Verdict
from codecllm.verifier.verification import verify

__all__ = [
    "BaselineOutcome",
    "Finding",
    "Report",
    "Stage",
    "Verdict",
    "record_baseline",
    "render_report",
    "verify",
]
