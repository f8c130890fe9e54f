"""Stages 1 and 2 hold tiles only: 256 MiB tensors take no more memory than 32 MiB ones."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from codecllm.converter import convert
from tests.sources import bf16, write_source

LIMIT_MIB = 64
_MEASURE = """
import json, sys
import codecllm.verifier.diagnosis.codes.back_ends as back_ends
import codecllm.verifier.diagnosis.codes.quantization as quantization
import codecllm.verifier.diagnosis.codes.round_trip as round_trip
from benchmarks.measure.memory import PeakMemory
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.verifier.report import Stage

with Container(sys.argv[1]) as container, SourceModel(sys.argv[2]) as source:
    first, second = Stage("round trip"), Stage("quantized")
    with PeakMemory() as peak:
        found = round_trip.examine_all(container, source, 2, None)
        decoders = back_ends.present_back_ends()
        round_trip.check_round_trip(container, source, None, found, decoders, first, 2)
        quantization.check_quantization(container, found, second)
print(json.dumps({"mib": peak.mib, "findings": len(first.findings) + len(second.findings)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
@pytest.mark.parametrize("rows", [4096, 32768])
def test_peak_memory_of_the_stages_without_a_model(tmp_path, rows, scheme):
    block = bf16(np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32))
    whole = np.concatenate([block] * (rows // 4096))
    write_source(tmp_path / "source", {"layer.weight": ("BF16", whole)}, {"model_type": "llama"})
    convert(tmp_path / "source", tmp_path / "out", scheme=scheme)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "out"), str(tmp_path / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["findings"] == 0
    assert figures["mib"] < LIMIT_MIB
