"""Error feedback on a device: the codes of the CPU, and one kernel for a panel of columns."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from codecllm.calibrator import device_feedback, rounding
from codecllm.calibrator.device_feedback import DeviceFeedback, DeviceProducts
from codecllm.calibrator.rounding import (
    codes_on_device,
    factor_on_device,
    round_by_columns,
    round_by_kernel,
)
from codecllm.converter import ConvertOptions
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.plan.params import NARROW_CODES
from codecllm.converter.rate.feedback import Feedback, factor_of, refined_codes
from codecllm.converter.rate.products import InputProducts
from codecllm.converter.source.source import SourceModel
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE
from codecllm.loader.kernels import nvrtc
from tests.sources import bf16, write_source
from tests.stepped import make_steps

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEADZONE = float(np.float32(0.05))
HEADER = """
#include <cmath>
#include <algorithm>
#define __global__
#define __fadd_rn(a, b) ((a) + (b))
#define __fsub_rn(a, b) ((a) - (b))
#define __fmul_rn(a, b) ((a) * (b))
#define __fdiv_rn(a, b) ((a) / (b))
struct Three { int x; };
static Three blockIdx, blockDim, threadIdx;
"""
MAIN = """
extern "C" void launch(int blocks, int threads, const float *a, const float *b, const float *c,
                       const float *d, const float *e, const float *f, float *g, short *h, int i,
                       int j, int k, int l, int m)
{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            round_panel(a, b, c, d, e, f, g, h, i, j, k, l, m);
}
"""


class _Emulated(nvrtc.Kernel):
    """The kernel on the CPU, one thread after another: no two of them meet."""

    def __init__(self, library):
        self._library = library

    def launch(self, blocks, threads, shared, arguments):
        values = [
            value if isinstance(value, int) else ctypes.c_void_p(value.data_ptr())
            for value in arguments
        ]
        self._library.launch(blocks, threads, *values)


@cache
def _emulated():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run rounding.cu on a CPU")
    source = HEADER + Path(rounding.__file__).with_name("rounding.cu").read_text() + MAIN
    with TemporaryDirectory() as folder:
        made = Path(folder) / "rounding.so"
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++"]
        done = subprocess.run(
            [compiler, *options, "-o", str(made), "-"],
            input=source,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return _Emulated(ctypes.CDLL(str(made)))


@pytest.fixture(params=["columns", "kernel"])
def round_panel(request, monkeypatch):
    """Each way to round a panel."""
    if request.param == "columns":
        return round_by_columns
    if DEVICE.type == "cpu":
        emulated = _emulated()
        monkeypatch.setattr(rounding, "_kernel", lambda device: emulated)
    return round_by_kernel


def _inputs(tokens, cols, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, cols)) @ rng.standard_normal((cols, cols))
    return mixed * np.exp(rng.standard_normal(cols)) / cols**0.5


def _case(rows, cols):
    """Returns weights [rows, cols], steps of rows, factors of columns, and products of inputs."""
    rng, inputs = np.random.default_rng(1), _inputs(500, cols)
    values = (
        rng.standard_normal((rows, cols)),
        0.3 * np.exp(0.3 * rng.standard_normal(rows)),
        np.exp(0.3 * rng.standard_normal(cols)),
        inputs.T @ inputs,
    )
    return [value.astype(np.float32) for value in values]


def _moved(*arrays):
    return [torch.from_numpy(array).to(DEVICE) for array in arrays]


@pytest.mark.parametrize("cols", [1, 10, 64, 65, 200])
@pytest.mark.parametrize("deadzone", [0.0, DEADZONE])
@pytest.mark.parametrize("by_column", [False, True])
def test_codes_are_those_of_numpy(round_panel, cols, deadzone, by_column):
    weights, row_scale, col_scale, products = _case(70, cols)
    scales = row_scale, col_scale if by_column else None
    expected = refined_codes(weights, scales, factor_of(products, 0.3), deadzone)
    on_device = _moved(weights, row_scale, col_scale, products)
    factor = factor_on_device(on_device[3], 0.3)
    given = on_device[1], on_device[2] if by_column else None
    codes = codes_on_device(on_device[0], given, factor, deadzone, round_panel).cpu().numpy()
    assert codes.dtype == np.int16
    # Sums of another order may round a code that lies halfway to the other side.
    assert (codes != expected).mean() <= 2e-3


def test_rows_that_feedback_leads_astray_are_those_of_numpy():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 96))
    products = inputs.T @ inputs
    weights = rng.standard_normal((40, 96)).astype(np.float32)
    steps = np.where(np.arange(40) % 2, 16.0, 0.1).astype(np.float32)
    expected = refined_codes(weights, (steps, None), factor_of(products, 0.001), DEADZONE)
    assert not expected[steps == 16.0].any()
    matrix, scales = (torch.from_numpy(part).to(DEVICE) for part in (weights, steps))
    factor = factor_on_device(torch.from_numpy(products).to(DEVICE), 0.001)
    codes = codes_on_device(matrix, (scales, None), factor, DEADZONE)
    assert np.array_equal(codes.cpu().numpy(), expected)


def test_both_ways_give_the_same_bits(monkeypatch):
    if DEVICE.type == "cpu":
        emulated = _emulated()
        monkeypatch.setattr(rounding, "_kernel", lambda device: emulated)
    weights, row_scale, col_scale, products = _moved(*_case(131, 300))
    factor = factor_on_device(products, 0.2)
    for deadzone in (0.0, DEADZONE):
        ways = [
            codes_on_device(weights, (row_scale, col_scale), factor, deadzone, way)
            for way in (round_by_columns, round_by_kernel)
        ]
        assert torch.equal(*ways)


def test_a_code_without_room_stays_in_range_and_feeds_its_error_on(round_panel):
    weights, products, ones = _moved(
        np.array([[1e6, 0.0]], np.float32),
        np.array([[2.0, 1.0], [1.0, 1.0]], np.float32),
        np.ones(1, np.float32),
    )
    factor = factor_on_device(products, 0.2)
    codes = codes_on_device(weights, (ones, None), factor, 0, round_panel)
    assert codes.tolist() == [[MAX_WIDE_CODE, MAX_WIDE_CODE]]
    codes = codes_on_device(weights, (ones, None), factor, 0, round_panel, NARROW_CODES)
    assert codes.tolist() == [[127, 127]]


def test_a_factor_is_that_of_numpy():
    products = _case(1, 150)[3]
    expected, got = factor_of(products, 0.2), factor_on_device(*_moved(products), 0.2)
    assert np.array_equal(got.order.cpu().numpy(), expected.order)
    below = np.tril(np.ones((150, 150), bool), -1)
    difference = np.abs(got.ratios.cpu().numpy() - expected.ratios)[below]
    assert difference.max() < 1e-5


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("place", ["device", "file"])
def test_rows_have_the_same_codes_however_they_are_asked_for(tmp_path, monkeypatch, dtype, place):
    monkeypatch.setattr(device_feedback, "_GROUP_ROWS", 1000)
    monkeypatch.setattr(device_feedback, "_PIECE", 7000)
    shared = _inputs(3000, 120)
    values = np.random.default_rng(5).standard_normal((2500, 120)).astype(np.float32)
    words = {"BF16": bf16(values), "F16": values.astype(np.float16), "F32": values}[dtype]
    names = ("gate", "up")
    source = write_source(tmp_path / "source", dict.fromkeys(names, (dtype, words)))

    def filled(sums):
        number = sums.new(120)
        torch.as_tensor(sums.matrix(number)).copy_(torch.from_numpy(shared.T @ shared))
        sums.count(number, 3000)
        for name in names:
            sums.assign(name, number)
        return sums

    on_device = DeviceProducts(DEVICE) if place == "device" else InputProducts(tmp_path)
    feedback = DeviceFeedback(filled(on_device), DEVICE)
    reference = Feedback(filled(InputProducts(tmp_path)))
    with SourceModel(source) as model:
        plans = plan_conversion(model, ConvertOptions(), accepts_params=True).tensors
        stored = [plan for plan in plans if plan.source.name in names]
        assert stored
        for plan in stored:
            steps = make_steps(plan, 0.3)
            refined = feedback.refine(plan, steps)
            expected = reference.refine(plan, steps).codes(0, 2500)
            whole = refined.codes(0, 2500)
            assert whole.dtype == np.int16 and not refined.codes._groups
            assert (whole != expected).mean() < 2e-3
            for pieces in ([0, 1, 700, 999, 1025, 2500], [0, 1999, 2000, 2500]):
                parts = [refined.codes(*part) for part in pairwise(pieces)]
                assert np.array_equal(np.concatenate(parts), whole)
