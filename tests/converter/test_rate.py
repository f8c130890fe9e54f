"""A conversion reaches the requested bits a weight, and spends them by sensitivity."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

import codecllm
from codecllm.converter import ParamsChoice, Rate, convert
from codecllm.converter.rate.allocation import Sensitivity, factors_of, row_steps
from codecllm.converter.rate.search import deadzone_at
from codecllm.formats.container import Container
from codecllm.formats.errors import NonFiniteWeightError, UsageError
from codecllm.formats.reference import read_tensor_bytes
from tests.stepped import fitted


@pytest.fixture
def made(tmp_path):
    """Saves matrices as a source."""

    def save(**tensors):
        folder = tmp_path / "source"
        folder.mkdir()
        save_file(
            {name: np.asarray(values, np.float32) for name, values in tensors.items()},
            folder / "model.safetensors",
        )
        return folder

    return save


def _gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def _floats(container, name):
    return np.frombuffer(read_tensor_bytes(container, name), np.float32)


def test_steps_are_the_mean_of_what_gradients_and_weights_ask_for():
    rows, cols = np.array([1.0, 16.0, 81.0]), np.array([4.0, 1.0])
    factors = factors_of(Sensitivity(cols * 49, rows * 2.5), 3, 2)
    steps = row_steps(factors, np.array([1.0, 4.0, 9.0]), 1.0)[:, None] * factors.cols
    damped = rows + 0.1 * rows.mean()
    expected = (damped**-0.25 * np.array([1.0, 2.0, 3.0]))[:, None] * (cols + 0.25) ** -0.5
    assert np.allclose(steps / steps[0, 0], expected / expected[0, 0])


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_tensors_steps_are_the_mean_of_what_its_gradients_and_its_weights_ask_for(size):
    sums, rms = np.ones(8), np.full(8, size)
    one, two = (factors_of(Sensitivity(scale * sums, scale * sums), 8, 8) for scale in (1.0, 4.0))
    # Gradients twice as large ask for steps half as wide.
    assert np.allclose(row_steps(two, rms, size) / row_steps(one, rms, size), 0.5**0.5)
    # Weights four times as large ask for steps four times as wide.
    assert np.allclose(row_steps(one, 4 * rms, 4 * size) / row_steps(one, rms, size), 4**0.5)


def test_without_factors_of_columns_a_row_has_their_mean_sensitivity():
    rows, even = np.array([1.0, 16.0, 81.0]), np.full(4, 2.5)
    uneven = np.array([1.0, 1.0, 1.0, 7.0])
    one, other = (
        factors_of(Sensitivity(cols, rows), 3, 4, column_scales=False) for cols in (even, uneven)
    )
    assert not one.by_column
    assert not other.by_column
    assert other.level == pytest.approx(one.level)
    assert np.array_equal(one.rows, other.rows)
    with_columns = factors_of(Sensitivity(uneven, rows), 3, 4)
    assert with_columns.by_column
    assert with_columns.level > one.level
    inputs_alone = factors_of(Sensitivity(uneven), 3, 4, column_scales=False)
    assert not inputs_alone.by_column


@pytest.mark.parametrize("bits", [3, 5])
def test_the_rate_is_hit_without_scales_of_columns(tmp_path, made, bits):
    folder = made(w=_gaussian(1024, 1024))
    seen = {"w": Sensitivity(np.exp(_gaussian(1, 1024, 1)[0]), np.exp(_gaussian(1, 1024, 2)[0]))}
    for column_scales in (True, False):
        steps = fitted(folder, bits, seen, column_scales=column_scales)
        out = tmp_path / str(column_scales)
        report = convert(folder, out, choice=ParamsChoice(steps, Rate(bits=bits)))
        assert report.quantized_bits_per_weight == pytest.approx(bits, rel=0.005)
        (record,) = report.manifest.tensors
        assert (record.xxh3.col_scale is not None) == column_scales
        assert ("col_scale" in report.manifest.required_features) == column_scales
        assert record.scale_dtype == "BF16"


def test_without_scales_of_columns_codes_keep_to_eight_bits(tmp_path, made):
    shape = (600, 512)
    weights = _gaussian(*shape)
    weights[3, 5] = 40
    folder = made(w=weights)
    steps = fitted(folder, 5, column_scales=False)
    report = convert(folder, tmp_path / "out", choice=ParamsChoice(steps, Rate(bits=5)))
    assert report.quantized_bits_per_weight == pytest.approx(5, rel=0.005)
    assert not report.manifest.tensors[0].wide
    with Container(tmp_path / "out") as container:
        assert _floats(container, "w").reshape(shape)[3, 5] == pytest.approx(40, rel=0.005)
    report = convert(folder, tmp_path / "wide", choice=ParamsChoice(fitted(folder, 5)))
    assert report.manifest.tensors[0].wide


@pytest.mark.parametrize("bits", [2.0, 3.1, 5.0, 7.5])
def test_the_rate_is_hit(tmp_path, made, bits):
    folder = made(a=_gaussian(1500, 700), b=_gaussian(300, 900, 1) * np.exp(_gaussian(1, 900, 2)))
    steps = fitted(folder, bits)
    report = convert(folder, tmp_path / "out", choice=ParamsChoice(steps, Rate(bits=bits)))
    assert report.quantized_bits_per_weight == pytest.approx(bits, rel=0.005)
    assert steps.bits == pytest.approx(bits, rel=0.003)


def test_low_rates_have_a_deadzone(tmp_path, made):
    assert [deadzone_at(bits) for bits in (2, 3, 3.75, 4.5, 8)] == pytest.approx(
        [0.05, 0.05, 0.025, 0, 0]
    )
    folder = made(w=_gaussian(400, 700))
    for bits, rounding in ((3, "deadzone"), (4.5, "nearest")):
        report = convert(
            folder,
            tmp_path / rounding,
            choice=ParamsChoice(fitted(folder, bits), Rate(bits=bits)),
        )
        (record,) = report.manifest.tensors
        assert record.rounding == rounding
        assert record.worst_steps == pytest.approx(0.5 + deadzone_at(bits), abs=1e-3)
        assert np.float32(record.deadzone or 0) == deadzone_at(bits)
        assert report.quantized_bits_per_weight == pytest.approx(bits, rel=0.005)


def test_the_rate_is_hit_where_the_rows_of_a_large_tensor_are_unlike(tmp_path, made):
    rows = 12000
    folder = made(
        words=_gaussian(rows, 500) * np.geomspace(1, 20, rows)[:, None]
    )  # six blocks, of which two are tried
    seen = Sensitivity(np.ones(500), np.geomspace(1, 1e-5, rows) ** 2)
    steps = fitted(folder, 4, {"words": seen})
    report = convert(folder, tmp_path / "out", choice=ParamsChoice(steps, Rate(bits=4)))
    assert report.quantized_bits_per_weight == pytest.approx(4, rel=0.005)


def test_columns_that_matter_are_quantized_finely_at_equal_bits(tmp_path, made):
    weights, loud = _gaussian(1024, 1024), np.exp(2 * _gaussian(1, 1024, 1)[0])
    folder = made(w=weights)
    harm = []
    for number, statistics in enumerate(({}, {"w": Sensitivity(loud**2)})):
        steps = fitted(folder, 4, statistics)
        report = convert(folder, tmp_path / str(number), choice=ParamsChoice(steps))
        assert report.quantized_bits_per_weight == pytest.approx(4, rel=0.005)
        with Container(tmp_path / str(number)) as container:
            decoded = _floats(container, "w").reshape(1024, 1024)
        harm.append(float((((decoded - weights) * loud) ** 2).sum()))
    assert harm[1] < harm[0] / 8


def test_a_weight_far_outside_is_kept_within_its_step(tmp_path, made):
    weights = _gaussian(600, 512)
    weights[3, 5] = 3e6
    folder = made(w=weights, z=np.zeros((300, 300)))
    convert(folder, tmp_path / "out", choice=ParamsChoice(fitted(folder, 6)))
    with Container(tmp_path / "out") as container:
        decoded = _floats(container, "w").reshape(600, 512)
        assert decoded[3, 5] == pytest.approx(3e6, rel=1e-3)
        assert not _floats(container, "z").any()


def test_a_weight_that_is_no_number_stops_or_stays_lossless(tmp_path, made):
    weights = _gaussian(300, 400)
    weights[7, 7] = np.nan
    folder = made(w=weights, v=_gaussian(300, 400))
    steps = fitted(folder, 5)
    with pytest.raises(NonFiniteWeightError):
        convert(folder, tmp_path / "out", choice=ParamsChoice(steps))
    report = convert(folder, tmp_path / "out", choice=ParamsChoice(steps), non_finite="lossless")
    assert {record.name: record.scheme for record in report.manifest.tensors} == {
        "v": "int8",
        "w": "lossless",
    }


def test_a_model_without_matrices_has_no_rate(made):
    with pytest.raises(UsageError, match="no tensor"):
        fitted(made(w=np.ones(70_000)), 5)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_matrices_of_a_few_weights(made, tmp_path, bits, shape, size):
    """Their tables alone may take more than the rate."""
    source, rate = made(w=np.full(shape, size)), {"bits": bits, "calibrate": "none"}
    try:
        codecllm.convert(source, tmp_path / "out", include=["*"], baseline=False, **rate)
    except UsageError:
        assert not (tmp_path / "out").exists()
    else:
        with Container(tmp_path / "out") as container:
            assert np.allclose(_floats(container, "w"), size, rtol=0.5)
