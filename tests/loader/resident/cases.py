"""Coded weights of both forms, and the values that each has to have."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.loader.engine import Request
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.resident.coded_weight import CodedWeight, coded_parameter
from codecllm.loader.resident.compressed_form import SharedDecoder
from codecllm.loader.resident.escapes import split_codes
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.scaled_codes import ScaledCodes
from tests.sources import write_source

CPU = torch.device("cpu")
ROWS, COLS = 144, 64


@dataclass(frozen=True)
class Case:
    """A form, and the weight that it holds."""

    form: WeightForm
    values: torch.Tensor

    def weight(self, dtype: torch.dtype = torch.float32) -> CodedWeight:
        """Returns a coded parameter."""
        return coded_parameter(self.form, dtype, CPU)

    def plain(self, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        """Returns a plain parameter of the same values."""
        return torch.nn.Parameter(self.values.to(dtype, copy=True), requires_grad=False)


def _int8(by_column: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (ROWS, COLS), dtype=torch.int8, generator=generator)
    scale = torch.rand(ROWS, generator=generator) * 0.02 + 1e-3
    columns = torch.linspace(0.5, 2, COLS) if by_column else None
    steps = scale[:, None] if columns is None else scale[:, None] * columns
    return Case(Int8Form("w", ScaledCodes(codes, scale, columns)), codes.float() * steps)


def _escapes() -> Case:
    """Codes of which a few need more than 8 bits."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (ROWS, COLS), dtype=torch.int16, generator=generator)
    codes[3, 5], codes[3, 6], codes[ROWS - 1, COLS - 1] = 300, -2000, 128
    scale = torch.rand(ROWS, generator=generator) * 0.02 + 1e-3
    columns = torch.linspace(0.5, 2, COLS)
    split = split_codes(codes)
    assert split is not None and split[1] is not None
    form = Int8Form("w", ScaledCodes(split[0], scale, columns, split[1]))
    return Case(form, codes.float() * (scale[:, None] * columns))


def _compressed(folder: Path) -> Case:
    generator = np.random.default_rng(1)
    values = (generator.standard_normal((ROWS, COLS)) * 0.05).astype(np.float32)
    source = write_source(folder / "source", {"w": ("F32", values)})
    out = convert(source, folder / "c", scheme="lossless", include=("*",)).out
    with Container(out) as opened:
        form, payload = SharedDecoder(1).hold(opened.tensor("w"))
        with closing(HostEngine(opened, 1)) as engine:
            engine.take(Request("w", "payload", out=payload)).get()
    return Case(form, torch.from_numpy(values))


def make_cases(folder: Path) -> dict[str, Case]:
    """Returns a case for each form; files go into a folder that is empty."""
    return {
        "int8": _int8(False),
        "columns": _int8(True),
        "escapes": _escapes(),
        "compressed": _compressed(folder),
    }
