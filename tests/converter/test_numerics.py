"""int8 codes and scales are those of the reference, at the edges of every float type too."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import NonFiniteWeightError
from codecllm.formats.reference import read_codes, read_tensor_bytes
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.schemes.int8 import channel_scales, quantize
from tests.sources import bf16, write_source

GPT2 = {"model_type": "gpt2"}
FMAX = np.finfo(np.float32).max


def _quantized(tmp_path, dtype, words, name="w", config=None):
    source = write_source(tmp_path / "source", {name: (dtype, words)}, config)
    convert(source, tmp_path / "out", include=("*",), workers=2)
    return Container(tmp_path / "out")


def _floats(dtype, words):
    return float32_from_bits(words.view(np.uint32 if dtype == "F32" else np.uint16), dtype)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(96, 96), (5, 1237), (700, 33), (3, 300_001), (2, 5_000_000)])
def test_codes_and_scales_are_those_of_the_reference(tmp_path, dtype, shape):
    rng = np.random.default_rng(0)
    values = (
        rng.standard_normal(shape, np.float32)
        * np.exp(rng.standard_normal((shape[0], 1), np.float32))
    ) ** 3
    words = (
        bf16(values).reshape(shape)
        if dtype == "BF16"
        else np.clip(values, -6e4, 6e4).astype("f2" if dtype == "F16" else "f4")
    )
    weights = _floats(dtype, words)
    with _quantized(tmp_path, dtype, words) as container:
        tensor = container.tensor("w")
        scales = channel_scales(np.abs(weights).max(axis=1))
        assert np.array_equal(tensor.scales, scales)
        assert np.array_equal(read_codes(tensor), quantize(weights, scales[:, None]))


def test_columns_of_conv1d(tmp_path):
    rng = np.random.default_rng(0)
    values = ((rng.standard_normal((200, 96)) * np.arange(1, 97)) ** 3).astype(np.float32)
    with _quantized(tmp_path, "F32", values, "h.0.mlp.c_fc.weight", GPT2) as container:
        tensor = container.tensor("h.0.mlp.c_fc.weight")
        assert (tensor.record.channel_axis, tensor.record.channel_kind) == (1, "column")
        scales = channel_scales(np.abs(values).max(axis=0))
        assert np.array_equal(tensor.scales, scales)
        assert np.array_equal(read_codes(tensor), quantize(values, scales[None, :]))


def test_every_output_row_of_every_fused_expert_has_a_scale(tmp_path):
    values = (np.random.default_rng(0).standard_normal((4, 48, 80)) ** 3).astype(np.float32)
    with _quantized(
        tmp_path, "F32", values, "model.layers.0.mlp.experts.gate_up_proj"
    ) as container:
        tensor = container.tensor("model.layers.0.mlp.experts.gate_up_proj")
        rows = values.reshape(192, 80)
        assert np.array_equal(tensor.scales, channel_scales(np.abs(rows).max(axis=1)))
        assert np.array_equal(read_codes(tensor), quantize(rows, tensor.scales[:, None]))


def test_error_stays_within_half_a_step_in_exact_arithmetic(tmp_path):
    rng = np.random.default_rng(7)
    values = (rng.standard_normal((40, 160)) * 10.0 ** rng.integers(-20, 20, (40, 1))).astype(
        np.float32
    )
    with _quantized(tmp_path, "F32", values) as container:
        tensor = container.tensor("w")
        codes = read_codes(tensor)
        slack = Fraction(1) + Fraction(1, 2**15)
        worst = Fraction(0)
        for row in range(40):
            scale = Fraction(float(tensor.scales[row]))
            for weight, code in zip(values[row].tolist(), codes[row].tolist(), strict=True):
                error = abs(Fraction(weight) - code * scale)
                assert error <= scale / 2 * slack
                worst = max(worst, error)
        assert float(worst) == pytest.approx(container.records["w"].worst_error, rel=1e-5)


def test_special_rows(tmp_path):
    """Zeros get scale 1.0, huge floats stay finite, subnormals beside large weights become 0."""
    values = (np.random.default_rng(0).standard_normal((64, 128)) ** 3).astype(np.float32)
    values[3] = 0.0
    values[4] = -0.0
    values[5, 0], values[6, 1] = FMAX, -FMAX
    values[7, :9] = [1e-45, -1e-45, 1e-39, 0.0, -0.0, 1.0, -1.0, 0.5, 2.0]
    values[8] = 127.0 * 2.0**-126
    with _quantized(tmp_path, "F32", values) as container:
        tensor = container.tensor("w")
        codes = read_codes(tensor)
        assert tensor.scales[3] == tensor.scales[4] == 1.0
        assert not codes[3].any()
        assert not codes[4].any()
        assert np.isfinite(tensor.scales).all()
        assert (codes[5, 0], codes[6, 1]) == (127, -127)
        assert list(codes[7, :5]) == [0, 0, 0, 0, 0]
        assert tensor.scales[8] == np.float32(2.0**-126)
        assert (codes[8] == 127).all()
        assert np.isfinite(np.frombuffer(read_tensor_bytes(container, "w"), np.float32)).all()


def test_channels_too_small_for_a_normal_scale_keep_every_bit(tmp_path):
    values = (np.random.default_rng(0).standard_normal((64, 256)) ** 3).astype(np.float32)
    values[9] = 1e-45
    with _quantized(tmp_path, "F32", values) as container:
        record = container.records["w"]
        assert record.scheme in ("lossless", "raw")
        assert "subnormal" in record.fallback
        assert read_tensor_bytes(container, "w") == values.tobytes()


@pytest.mark.parametrize(("bad", "count"), [([np.nan], 1), ([np.inf, -np.inf, np.nan], 3)])
@pytest.mark.parametrize("shape", [(300, 256), (2, 4_500_000)])
def test_non_finite_weights_are_named(tmp_path, bad, count, shape):
    values = np.ones(shape, np.float32)
    values[1, 7 : 7 + count] = bad
    source = write_source(
        tmp_path / "source", {"ok": ("F32", np.ones((4, 4), np.float32)), "w": ("F32", values)}
    )
    with pytest.raises(NonFiniteWeightError) as caught:
        convert(source, tmp_path / "out", include=("*",))
    assert caught.value.tensor == "w"
    assert "row 1" in str(caught.value)
    assert str(count) in str(caught.value)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", include=("*",), non_finite="lossless")
    with Container(tmp_path / "out") as container:
        assert container.records["w"].scheme != "int8"
        assert read_tensor_bytes(container, "w") == values.tobytes()


def test_non_finite_weights_are_no_matter_to_lossless(tmp_path):
    values = np.full((64, 256), np.nan, np.float32)
    source = write_source(tmp_path / "source", {"w": ("F32", values)})
    convert(source, tmp_path / "out", scheme="lossless")
    with Container(tmp_path / "out") as container:
        assert read_tensor_bytes(container, "w") == values.tobytes()
