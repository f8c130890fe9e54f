"""Error feedback: equal to GPTQ's order, and better than rounding for related inputs."""

from __future__ import annotations

import errno
import os
import tempfile
from itertools import pairwise

import numpy as np
import pytest

from codecllm.converter import ConvertOptions, ParamsChoice, Rate, convert
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.plan.params import NARROW_CODES
from codecllm.converter.rate import feedback
from codecllm.converter.rate.feedback import (
    FARTHEST,
    RIDGE,
    Feedback,
    factor_of,
    refined_codes,
    shrinkage,
)
from codecllm.converter.rate.products import InputProducts
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE, step_sizes
from tests.sources import bf16, write_source
from tests.stepped import fitted, make_steps, weights_of

DEADZONE = float(np.float32(0.05))


def _inputs(tokens, cols, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, cols)) @ rng.standard_normal((cols, cols))
    return mixed * np.exp(rng.standard_normal(cols)) / cols**0.5


def _weights(rows, cols, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, cols)).astype(np.float32), np.exp(
        0.3 * rng.standard_normal(max(rows, cols))
    ).astype(np.float32)


def _textbook(weights, steps, products, shrunk, deadzone):
    """GPTQ by columns, in float64: a row of the inverse's factor corrects the later weights."""
    diagonal = products.diagonal().astype(np.float64)
    matrix = products.astype(np.float64) * (1 - shrunk)
    np.fill_diagonal(matrix, diagonal + RIDGE * diagonal.mean())
    order = np.argsort(-diagonal, kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T
    left = weights[:, order].astype(np.float64)
    steps = np.broadcast_to(steps, weights.shape)[:, order].astype(np.float64)
    codes = np.zeros(weights.shape, np.int64)
    for column in range(weights.shape[1]):
        quotient = left[:, column] / steps[:, column]
        chosen = np.rint(quotient - np.copysign(deadzone, quotient))
        error = (left[:, column] - chosen * steps[:, column]) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        codes[:, order[column]] = chosen
    return codes


@pytest.mark.parametrize("cols", [1, 10, 64, 65, 200])
@pytest.mark.parametrize("deadzone", [0.0, DEADZONE])
@pytest.mark.parametrize("by_column", [False, True])
def test_codes_are_those_of_the_textbook(cols, deadzone, by_column):
    inputs = _inputs(500, cols)
    products = (inputs.T @ inputs).astype(np.float32)
    weights, factors = _weights(40, cols)
    scales = 0.3 * factors[:40], factors[:cols][::-1].copy() if by_column else None
    codes = refined_codes(weights, scales, factor_of(products, 0.3), deadzone)
    assert codes.dtype == np.int16
    assert np.array_equal(codes, _textbook(weights, step_sizes(*scales), products, 0.3, deadzone))


def test_outputs_are_nearer_than_with_the_nearest_codes():
    inputs = _inputs(2000, 96)
    weights, factors = _weights(60, 96)
    steps = 0.5 * factors[:60, None] * np.ones((1, 96), np.float32)
    seen, unseen = inputs[:1500], inputs[1500:]
    codes = refined_codes(weights, (0.5 * factors[:60], None), factor_of(seen.T @ seen, 0.2))
    nearest = np.rint(weights / steps)
    harm = [
        float((((weights - chosen * steps) @ unseen.T) ** 2).sum()) for chosen in (codes, nearest)
    ]
    assert harm[0] < 0.6 * harm[1]
    assert np.abs(weights / steps - codes).max() > 0.6


def test_inputs_that_are_never_used_or_always_alike():
    inputs = _inputs(100, 30)
    inputs[:, 7], inputs[:, 8] = 0, inputs[:, 9]
    weights, factors = _weights(20, 30)
    codes = refined_codes(weights, (factors[:20], None), factor_of(inputs.T @ inputs, 0.2))
    assert np.array_equal(codes[:, 7], np.rint(weights[:, 7] / factors[:20]))
    assert np.array_equal(
        codes, _textbook(weights, factors[:20, None] * np.ones((1, 30)), inputs.T @ inputs, 0.2, 0)
    )


def test_the_fewer_tokens_the_less_is_made_of_pairs():
    assert [shrinkage(tokens) for tokens in (65536, 16384, 4096, 655, 0)] == pytest.approx(
        [0.1, 0.2, 0.4, 1, 1], abs=0.001
    )
    weights, factors = _weights(20, 30)
    inputs = _inputs(100, 30)
    codes = refined_codes(weights, (factors[:20], None), factor_of(inputs.T @ inputs, 1.0))
    assert np.array_equal(codes, np.rint(weights / factors[:20, None]))


@pytest.mark.parametrize("deadzone", [0.0, DEADZONE])
def test_no_row_is_much_farther_from_its_weights_than_zeros(deadzone):
    """Inputs of two directions alone: any sum of columns outside of them seems harmless."""
    inputs = _inputs(60, 2) @ np.random.default_rng(5).standard_normal((2, 96))
    factor = factor_of(inputs.T @ inputs, 0.001)
    weights, _ = _weights(40, 96)
    steps = np.where(np.arange(40) % 2, 16.0, 0.1).astype(np.float32)
    codes = refined_codes(weights, (steps, None), factor, deadzone)
    for row in range(40):
        error = np.square(weights[row] - codes[row] * steps[row]).sum()
        assert error <= FARTHEST**2 * np.square(weights[row]).sum()
        by_nearest = np.rint(weights[row] / steps[row])
        assert np.array_equal(codes[row], by_nearest) == (steps[row] == 16.0)


def test_a_code_without_room_stays_in_range_and_feeds_its_error_on():
    weights = np.array([[1e6, 0.0]], np.float32)
    products = np.array([[2.0, 1.0], [1.0, 1.0]])
    steps, factor = (np.ones(1, np.float32), None), factor_of(products, 0.2)
    codes = refined_codes(weights, steps, factor)
    assert codes[0, 0] == MAX_WIDE_CODE == codes[0, 1]
    assert refined_codes(weights, steps, factor, limits=NARROW_CODES)[0, 0] == 127


@pytest.fixture
def made(tmp_path):
    """Two layers with the same correlated inputs, their sums, and an embedding without sums."""
    shared, rows = _inputs(3000, 600), np.random.default_rng(5)
    tensors = {
        "up": rows.standard_normal((2500, 600)),
        "gate": rows.standard_normal((300, 600)),
        "words": rows.standard_normal((400, 300)),
    }
    source = write_source(
        tmp_path / "source",
        {name: ("BF16", bf16(values.astype(np.float32))) for name, values in tensors.items()},
    )

    def products():
        held = InputProducts(tmp_path)
        number = held.new(600)
        held.matrix(number)[...] = shared.T @ shared
        held.count(number, 3000)
        held.assign("up", number)
        held.assign("gate", number)
        return held

    return source, products, shared


def test_rows_have_the_same_codes_however_they_are_asked_for(made):
    source, products, shared = made
    with SourceModel(source) as model:
        plan = next(
            plan
            for plan in plan_conversion(model, ConvertOptions(), accepts_params=True).tensors
            if plan.source.name == "up"
        )
        steps = make_steps(plan, 0.3)
        weights = weights_of(plan)
        whole = refined_codes(
            weights,
            (steps.row_scale, steps.col_scale),
            factor_of(shared.T @ shared, shrinkage(3000)),
        )
        refined = Feedback(products()).refine(plan, steps)
        assert (refined.rounding, steps.rounding) == ("feedback", "nearest")
        first = refined.codes(0, 2500)
        assert (first != whole).mean() < 1e-3  # products of other shapes are rounded otherwise
        assert not refined.codes._groups
        for pieces in ([0, 1, 700, 1023, 1025, 2500], [0, 2047, 2048, 2500]):
            parts = [refined.codes(*part) for part in pairwise(pieces)]
            assert np.array_equal(np.concatenate(parts), first)
        assert not refined.codes._groups


def test_refined_codes_have_the_rate_and_less_harm_and_the_same_bytes_from_any_number_of_workers(
    tmp_path, made, monkeypatch
):
    source, products, shared = made
    monkeypatch.setattr(feedback, "_GROUP_ROWS", 400)
    bits, made_bytes, harm = 3.5, [], []
    for workers, held in ((1, products()), (4, products()), (2, None)):
        out = tmp_path / f"{workers}"
        told = []
        refiner = held and Feedback(held)
        steps = fitted(source, bits, {}, refiner, told.append, workers=workers)
        rate = Rate(bits=bits, refine=held is not None)
        report = convert(
            source,
            out,
            choice=ParamsChoice(steps, rate),
            workers=workers,
        )
        assert report.quantized_bits_per_weight == pytest.approx(bits, rel=0.005)
        made_bytes.append({path.name: path.read_bytes() for path in out.iterdir()})
        with Container(out) as container, SourceModel(source) as model:
            rounded = {name: record.rounding for name, record in container.records.items()}
            errors = _floats(container, "up") - _floats_of(model, "up")
            harm.append(float(((errors @ shared.T) ** 2).sum()))
        if held is not None:
            assert rounded == {
                "up": "feedback-deadzone",
                "gate": "feedback-deadzone",
                "words": "deadzone",
            }
            assert any("1 of 3 tensors" in note and "words" in note for note in steps.notes)
            assert any(sentence.startswith("refining") for sentence in told)
    assert made_bytes[0] == made_bytes[1]
    assert harm[0] < 0.75 * harm[2]


def _floats(container, name):
    words = np.frombuffer(read_tensor_bytes(container, name), np.uint16).astype(np.uint32) << 16
    return words.view(np.float32).reshape(-1, 600)


def _floats_of(model, name):
    tensor = model.tensors[name]
    words = tensor.read_elements(0, tensor.entry.elements).astype(np.uint32) << 16
    return words.view(np.float32).reshape(tensor.shape)


def test_sums_lie_in_a_file_without_a_name(tmp_path):
    held = InputProducts(tmp_path)
    numbers = [held.new(cols) for cols in (3, 1100, 7)]
    for number in numbers:
        assert not held.matrix(number).any()
        held.matrix(number)[...] += number + 1
    assert [float(held.matrix(number).max()) for number in numbers] == [1, 2, 3]
    assert [len(held.matrix(number)) for number in numbers] == [3, 1100, 7]
    assert not list(tmp_path.iterdir())
    held.close()
    held.close()


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for the sums") as caught:
        InputProducts(tmp_path).new(100)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == tempfile.gettempdir()
