"""Conversions with the caller's steps: the reference's codes, and always the same bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from codecllm.converter import ConvertOptions, ParamsChoice, Rate, convert, convert_model, estimate
from codecllm.converter.encode.quantize import quantize_steps
from codecllm.converter.options import Origin
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.plan.params import QuantParams, column_tiles, max_tiles
from codecllm.converter.rate.overhead import frame_bytes, tensor_bytes
from codecllm.converter.rate.trial import count_blocks, packed_size
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.manifest import Conversion
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    NonFiniteWeightError,
    UnsupportedVersionError,
    UsageError,
)
from codecllm.formats.manifest import reading as manifest_module
from codecllm.formats.manifest.records import DEADZONE, NEAREST, Calibration
from codecllm.formats.reference import read_codes, read_rows, read_tensor_bytes, tensor_digest
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.schemes.int8 import dequantize, quantize, step_sizes
from codecllm.formats.shards.chunk_table import slot_bytes
from tests.sources import bf16, write_source
from tests.stepped import make_steps, provider, weights_of

RNG = np.random.default_rng(7)
BASE = RNG.standard_normal((90, 123)).astype(np.float32)
ZEROS = BASE.copy()
ZEROS[[0, 5, 89]], ZEROS[:, [0, 60, 122]] = 0, 0
TENSORS = {
    "odd": ("BF16", bf16(BASE * np.exp(RNG.standard_normal(123)))),
    "zeros": ("F32", ZEROS),
    "nothing": ("F32", np.zeros((64, 64), np.float32)),
    "huge": ("F32", BASE * np.float32(2.0**100)),
    "tiny": ("F32", BASE * np.float32(2.0**-100)),
    "half": ("F16", BASE.astype(np.float16)),
    "flat": ("F32", RNG.standard_normal((1, 9000)).astype(np.float32)),
    "experts.down_proj": ("BF16", bf16(RNG.standard_normal((4, 30, 50))).reshape(4, 30, 50)),
    "h.0.attn.c_attn.weight": ("F32", RNG.standard_normal((70, 96)).astype(np.float32)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("steps") / "source", TENSORS, {"model_type": "gpt2"}
    )


def _plan(folder, name):
    model = SourceModel(folder)
    plans = plan_conversion(model, ConvertOptions(include=("*",)), accepts_params=True).tensors
    return next(plan for plan in plans if plan.source.name == name)


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("factor", [0.3, 0.012])
@pytest.mark.parametrize("tile", [None, (17, 20)])
def test_every_tensor_holds_what_the_reference_makes_of_it(source, tmp_path, codec, factor, tile):
    given = {}

    def provide(plan):
        flat = (
            plan.source.name == "flat"
        )  # a scale for each column would be larger than what it saves
        short = plan.source.name in ("zeros", "half", "flat", "h.0.attn.c_attn.weight")
        steps = make_steps(plan, factor, columns=not flat, short=short, tile=None if flat else tile)
        given[plan.source.name] = (steps, weights_of(plan))
        return given[plan.source.name][0]

    convert(source, tmp_path / "c", codec=codec, include=("*",), choice=ParamsChoice(provide))
    with Container(tmp_path / "c") as container:
        assert given.keys() == TENSORS.keys()
        quantized = {name for name, record in container.records.items() if record.scheme == "int8"}
        assert quantized == TENSORS.keys()
        for name, (steps, weights) in given.items():
            tensor = container.tensor(name)
            sizes = (
                steps.row_scale[None, :]
                if "c_attn" in name
                else step_sizes(steps.row_scale, steps.col_scale)
            )
            codes = quantize(weights, sizes, wide=True)
            assert np.array_equal(read_codes(tensor), codes), name
            assert tensor.wide == bool((np.abs(codes.astype(int)) > 127).any())
            expected = bits_from_float32(dequantize(codes, sizes), tensor.record.dtype)
            assert read_tensor_bytes(container, name) == expected.tobytes(), name
            assert tensor_digest(container, name) == tensor.record.digest
            error = np.abs(weights / sizes.astype(np.float64) - codes).max()
            assert tensor.record.worst_steps == pytest.approx(error, abs=1e-3)
            assert tensor.record.rounding == NEAREST
            assert np.array_equal(tensor.scales, steps.row_scale)
            assert tensor.record.scale_dtype == (
                "BF16" if name in ("zeros", "half", "flat", "h.0.attn.c_attn.weight") else None
            )
            assert tensor.record.scale_range == pytest.approx(
                [steps.row_scale.min(), steps.row_scale.max()]
            )
            for first, last in (
                (0, 1),
                (len(codes) // 3, len(codes)),
                (len(codes) // 2, len(codes) // 2 + 1),
            ):
                assert read_rows(tensor, first, last) == expected[first:last].tobytes()
        assert ("wide" in container.manifest.required_features) == (factor == 0.012)


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_same_bytes_from_any_number_of_workers(source, tmp_path, codec):
    for workers in (1, 2, 8):
        out = tmp_path / f"{workers}"
        convert(
            source,
            out,
            codec=codec,
            include=("*",),
            choice=ParamsChoice(provider(0.02)),
            workers=workers,
            max_shard_bytes=60_000,
        )
    made = [
        {path.name: path.read_bytes() for path in (tmp_path / f"{workers}").iterdir()}
        for workers in (1, 2, 8)
    ]
    assert made[0] == made[1] == made[2]
    assert len(made[0]) > 4


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_a_wide_code_that_comes_late(tmp_path, codec):
    """The first blocks need one plane, later ones two: all codes are packed again in two planes."""
    values = RNG.standard_normal((1100, 2048)).astype(np.float32)
    values[1099, 2000] = 300
    source = write_source(tmp_path / "source", {"w": ("F32", values), "x": ("F32", values[:1000])})
    options = {"columns": False, "tile": (60, 512)}
    convert(source, tmp_path / "late", codec=codec, choice=ParamsChoice(provider(0.1, **options)))
    told = [
        make_steps(plan := _plan(source, name), 0.1, wide=name == "w", **options)
        for name in ("w", "x")
    ]
    assert count_blocks(plan, told[1]) == 3
    convert(
        source,
        tmp_path / "told",
        codec=codec,
        choice=ParamsChoice(lambda p: told[p.source.name == "x"]),
    )
    shards = [
        (tmp_path / name / "model-00001-of-00001.safetensors").read_bytes()
        for name in ("late", "told")
    ]
    assert shards[0] == shards[1]
    with Container(tmp_path / "late") as container:
        table = container.tensor("w").table
        whole = [
            chunk.stored_bytes
            for chunk, bits in zip(table.chunks[1::2], table.low_bits, strict=True)
            if bits == 8
        ]
        assert max(whole) <= (129 if codec == "rans" else 23)
        assert len(whole) >= len(table.grid) - (table.grid.down if codec == "rans" else 1)
        assert not container.records["x"].wide
        assert tensor_digest(container, "w") == container.records["w"].digest


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("factor", [0.3, 0.012])
def test_a_sample_of_everything_is_the_stored_size(tmp_path, codec, factor):
    values = (RNG.standard_normal((2500, 600)) * np.exp(RNG.standard_normal(600))).astype(
        np.float32
    )
    source = write_source(tmp_path / "source", {"w": ("F32", values)})
    convert(source, tmp_path / "c", codec=codec, choice=ParamsChoice(provider(factor)))
    with Container(tmp_path / "c") as container:
        tensor = container.tensor("w")
        tables = tensor.record.tables_bytes or 0
        stored = sum(slot_bytes(chunk.stored_bytes) + 16 for chunk in tensor.table.chunks)
        whole = 8 * container.stored_bytes
    with SourceModel(source) as model:
        options, choice = ConvertOptions(codec=codec), ParamsChoice(provider(factor))
        whole_plan = plan_conversion(model, options, accepts_params=True)
        conversion = Conversion(model, whole_plan, options, choice, Origin())
        plan, frame = whole_plan.tensors[0], frame_bytes(conversion, {"w"})
        steps = make_steps(plan, factor)
        assert count_blocks(plan, steps) == 2
        sample = packed_size(plan, steps, 0, 2)
        half = packed_size(plan, steps, 1)
    assert sample.elements == values.size
    assert sample.wide == (factor == 0.012)
    assert (
        0 <= 8 * (stored + tables) - sample.stored_bits <= 8 * 2 * 40
    )  # header and sizes of the tables
    assert half.stored_bits / half.elements == pytest.approx(
        sample.stored_bits / sample.elements, rel=0.02
    )
    predicted_bytes = sample.stored_bits / 8 + tensor_bytes(plan, steps, wide=sample.wide) + frame
    assert predicted_bytes == pytest.approx(whole / 8, abs=100)
    predicted = estimate(source, ConvertOptions(codec=codec), choice)
    assert predicted.stored_bytes == pytest.approx(whole / 8, rel=0.02)


@pytest.mark.parametrize("deadzone", [2.0**-5, float(np.float32(0.05))])
def test_a_deadzone_takes_the_smaller_code_where_both_are_nearly_as_near(
    source, tmp_path, deadzone
):
    given = {}

    def provide(plan):
        given[plan.source.name] = (
            replace(make_steps(plan, 0.8), deadzone=deadzone),
            weights_of(plan),
        )
        return given[plan.source.name][0]

    convert(source, tmp_path / "c", include=("*",), choice=ParamsChoice(provide))
    with Container(tmp_path / "c") as container:
        for name, (steps, weights) in given.items():
            tensor = container.tensor(name)
            if name == "flat":  # too short for so wide a step to save what describes it
                continue
            assert tensor.record.rounding == DEADZONE
            sizes = (
                steps.row_scale[None, :]
                if "c_attn" in name
                else step_sizes(steps.row_scale, steps.col_scale)
            )
            quotients = weights / sizes
            expected = np.sign(quotients) * np.ceil(
                np.abs(quotients).astype(np.float64) + 0.5 - deadzone - 1
            )
            codes = read_codes(tensor)
            near_a_tie = np.abs((np.abs(quotients) - deadzone) % 1 - 0.5) < 1e-5
            assert near_a_tie.mean() < 0.001
            assert (codes == expected)[~near_a_tie].all(), name
            stored = float(np.float32(tensor.record.deadzone))
            assert np.array_equal(codes, quantize(weights, sizes, wide=True, deadzone=stored)), (
                "the reference, bit for bit"
            )
            assert 0.5 < tensor.record.worst_steps <= 0.5 + deadzone + 1e-6 or not weights.any()
            assert (np.abs(codes) <= np.abs(quantize(weights, sizes, wide=True))).all()


def test_refined_codes_are_kept_as_they_are(source, tmp_path):
    def provide(plan):
        steps = make_steps(plan, 0.1)
        codes = (
            weights_of(plan).astype(np.int16) * 0 + np.arange(plan.matrix[1], dtype=np.int16) % 5
        )
        return replace(steps, refined="feedback", codes=lambda first, last: codes[first:last])

    convert(
        source, tmp_path / "c", include=("odd",), exclude=("[!o]*",), choice=ParamsChoice(provide)
    )
    with Container(tmp_path / "c") as container:
        tensor = container.tensor("odd")
        assert np.array_equal(read_codes(tensor), np.broadcast_to(np.arange(123) % 5, (90, 123)))
        assert tensor.record.rounding == "feedback"
        assert tensor.record.worst_steps > 4


def test_without_steps_nothing_changes(source, tmp_path):
    convert(source, tmp_path / "plain", include=("*",))
    convert(source, tmp_path / "none", include=("*",), choice=ParamsChoice(lambda plan: None))
    records = []
    for name in ("plain", "none"):
        with Container(tmp_path / name) as container:
            records.append([record.model_dump() for record in container.manifest.tensors])
            assert container.manifest.required_features == []
            assert container.manifest.format_version == ("1.1" if name == "plain" else "1.2")
    assert records[0] == records[1]


def test_what_was_asked_for_is_recorded(source, tmp_path):
    calibration = Calibration(kind="self", tokens=128, seed=3, sha256="ab" * 32)
    for rate, bits, ratio in (
        (Rate(bits=5, calibrate="self", refine=True), 5, None),
        (Rate(quality="small", calibrate="self", refine=True), 4, None),
        (Rate(ratio=3.2, calibrate="self", refine=True), None, 3.2),
    ):
        choice = ParamsChoice(lambda plan: None, rate, calibration)
        manifest = convert(source, tmp_path / "c", choice=choice, force=True).manifest
        options = manifest.options
        assert (options.bits, options.ratio) == (bits, ratio)
        assert (options.calibrate, options.refine) == ("self", True)
        assert manifest.calibration == calibration
        assert manifest.required_features == ["steps"]


def test_a_rate_without_chosen_parameters_is_refused(source, tmp_path):
    with (
        SourceModel(source) as model,
        pytest.raises(UsageError, match="no quantization parameters"),
    ):
        convert_model(model, tmp_path / "c", ConvertOptions(rate=Rate(bits=5)))
    assert not (tmp_path / "c").exists()


def test_older_readers_refuse_the_features_by_name(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "c", include=("*",), choice=ParamsChoice(provider(0.012)))
    for name in ("steps", "col_scale", "wide"):
        known = manifest_module.KNOWN_FEATURES - {name}
        with monkeypatch.context() as patch:
            patch.setattr(manifest_module, "KNOWN_FEATURES", known)
            with pytest.raises(UnsupportedVersionError, match=f"unknown required feature '{name}'"):
                Container(tmp_path / "c")


def _with(**fields):
    return lambda steps: replace(steps, **fields)


WRONG = {
    "row_scale of another type": (
        lambda s: replace(s, row_scale=s.row_scale.astype(np.float64)),
        "row_scale",
    ),
    "row_scale of another shape": (lambda s: replace(s, row_scale=s.row_scale[1:]), "row_scale"),
    "col_scale of another shape": (lambda s: replace(s, col_scale=s.col_scale[1:]), "col_scale"),
    "groups alone": (_with(col_scale=None), "need scales"),
    "groups of another type": (lambda s: replace(s, col_groups=np.zeros(123, int)), "col_groups"),
    "groups of another shape": (lambda s: replace(s, col_groups=s.col_groups[1:]), "col_groups"),
    "a subnormal step": (
        lambda s: replace(s, row_scale=s.row_scale * np.float32(2.0**-126)),
        "not allowed",
    ),
    "a step of zero": (lambda s: replace(s, row_scale=s.row_scale * 0), "not allowed"),
    "too many tiles": (_with(tile=(1, 1)), "too many tiles"),
    "a tile without extent": (_with(tile=(0, 5)), "no extent"),
    "codes without a name": (_with(codes=lambda a, b: None), "rounding"),
    "a name without codes": (_with(refined="feedback"), "rounding"),
    "codes under the name of another rounding": (
        _with(refined="nearest", codes=lambda a, b: None),
        "rounding",
    ),
    "a deadzone of half a step": (_with(deadzone=0.5), "deadzone"),
    "a deadzone that float32 has not": (_with(deadzone=0.05), "deadzone"),
    "codes of another shape": (
        _with(refined="x", codes=lambda a, b: np.zeros((1, 1), np.int16)),
        "wrong type or shape",
    ),
    "codes of another type": (
        _with(refined="x", codes=lambda a, b: np.zeros((90, 123), np.int8)),
        "wrong type or shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_steps_that_do_not_fit_are_refused_before_anything_is_written(source, tmp_path, name):
    change, words = WRONG[name]
    with pytest.raises(UsageError, match=words) as caught:
        convert(
            source,
            tmp_path / "c",
            include=("odd",),
            choice=ParamsChoice(lambda plan: change(make_steps(plan))),
        )
    assert caught.value.tensor == "odd"
    assert not (tmp_path / "c").exists()


def test_a_column_of_channels_has_no_second_scale(source, tmp_path):
    wrong = QuantParams(np.ones(96, np.float32), np.ones(96, np.float32))
    with pytest.raises(UsageError, match="no second one"):
        convert(source, tmp_path / "c", include=("h.*",), choice=ParamsChoice(lambda plan: wrong))


def test_what_two_planes_cannot_hold_is_kept_lossless(source, tmp_path):
    convert(
        source,
        tmp_path / "c",
        include=("odd",),
        exclude=("[!o]*",),
        choice=ParamsChoice(provider(1e-6)),
    )
    with Container(tmp_path / "c") as container:
        assert container.records["odd"].scheme == "lossless"
        assert "steps from zero" in container.records["odd"].fallback
    with pytest.raises(UsageError, match="codes"):
        packed_size(plan := _plan(source, "odd"), make_steps(plan, 1e-6))


def test_steps_too_large_for_wide_codes_are_never_written(tmp_path):
    """The format bounds them, so that any code times a step is finite."""
    values = np.abs(BASE) * np.float32(2.0**120)
    source = write_source(tmp_path / "source", {"w": ("F32", values)})
    convert(source, tmp_path / "c", include=("*",), choice=ParamsChoice(provider(0.012)))
    convert(source, tmp_path / "narrow", include=("*",), choice=ParamsChoice(provider(0.3)))
    with Container(tmp_path / "c") as container, Container(tmp_path / "narrow") as narrow:
        assert container.records["w"].scheme == "lossless"
        assert read_tensor_bytes(container, "w") == values.tobytes()
        assert narrow.records["w"].scheme == "int8"
        assert np.isfinite(np.frombuffer(read_tensor_bytes(narrow, "w"), np.float32)).all()


@pytest.mark.parametrize(
    ("dtype", "word", "step", "has_overflow"),
    [
        ("F16", 0x7BFF, 30000.0, False),  # 65504 as 2 steps: 60000
        ("F16", 0xFBFF, 21840.5, True),  # -65504 as -3 steps: -65521.5, rounded -infinity
        ("F16", 0x7BFF, 21839.5, False),  # 65518.5 is nearer to 65504 than to 65536
        ("BF16", 0x7F7F, 1.7 * 2.0**126, False),
        ("F32", 0x7F7FFFFF, 1.7 * 2.0**126, False),
        ("BF16", 0x7F7F, 1.34 * 2.0**126, True),  # 3 steps
        ("F32", 0xFF7FFFFF, 1.34 * 2.0**126, True),
    ],
)
@pytest.mark.parametrize("refined", [False, True])
def test_no_finite_weight_becomes_infinite(dtype, word, step, has_overflow, refined):
    """Rounding up near the end of a dtype: such a tensor stays lossless."""
    words = np.zeros((3, 40), np.uint32 if dtype == "F32" else np.uint16)
    words[1, 7] = word
    rows, cols = np.full((3, 1), step, np.float32), np.ones((1, 40), np.float32)
    for col_scale in (None, cols):
        codes = np.zeros((3, 40), np.int16)
        if refined:
            largest = float32_from_bits(words[1, 7:8], dtype)[0]
            codes[1, 7] = np.rint(largest / np.float32(step))
        result = quantize_steps(words, dtype, (rows, col_scale), codes, refined)
        assert result.overflows == has_overflow
        if not has_overflow:
            with np.errstate(over="ignore"):
                bits = bits_from_float32(codes * rows, dtype)
            assert np.isfinite(float32_from_bits(bits, dtype)).all() and codes[1, 7]


def test_a_tensor_near_the_end_of_its_dtype_stays_lossless(tmp_path):
    values = np.linspace(-65504, 65504, 4096, dtype=np.float32).reshape(64, 64).astype(np.float16)
    source = write_source(tmp_path / "source", {"w": ("F16", values)})
    steps = ParamsChoice(lambda plan: QuantParams(np.full(64, 21845.0, np.float32)))
    convert(source, tmp_path / "c", include=("*",), choice=steps)
    with Container(tmp_path / "c") as container:
        assert container.records["w"].scheme == "lossless"
        assert "would be infinite" in container.records["w"].fallback
        assert read_tensor_bytes(container, "w") == values.tobytes()
    with pytest.raises(UsageError, match=r"overflow\): excluded, it stays lossless"):
        packed_size(plan := _plan(source, "w"), steps.provider(plan))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("refined", [False, True])
def test_weights_that_are_no_numbers(tmp_path, bad, refined):
    values = BASE.copy()
    values[4, 4] = bad
    source = write_source(tmp_path / "source", {"w": ("F32", values)})
    steps = QuantParams(np.ones(90, np.float32), np.ones(123, np.float32))
    if refined:
        steps = replace(
            steps, refined="x", codes=lambda first, last: np.zeros((last - first, 123), np.int16)
        )
    with pytest.raises(NonFiniteWeightError, match="first in row 4"):
        convert(source, tmp_path / "c", include=("*",), choice=ParamsChoice(lambda plan: steps))
    convert(
        source,
        tmp_path / "kept",
        include=("*",),
        choice=ParamsChoice(lambda plan: steps),
        non_finite="lossless",
    )
    with Container(tmp_path / "kept") as container:
        assert read_tensor_bytes(container, "w") == values.tobytes()


@pytest.mark.parametrize("name", ["w_col_scale", "w_col_group", "w_tables"])
def test_a_tensor_named_like_a_side_tensor_keeps_its_name_and_bits(tmp_path, name):
    tensors = {"w": ("F32", BASE), name: ("F32", BASE + 1)}
    source = write_source(tmp_path / "source", tensors)
    report = convert(
        source, tmp_path / "c", include=("*",), choice=ParamsChoice(provider()), codec="rans"
    )
    by_name = {record.name: record for record in report.manifest.tensors}
    assert by_name["w"].scheme == ("lossless" if "col" in name else "raw")
    assert "side tensor" in by_name["w"].fallback
    with Container(tmp_path / "c") as container:
        assert read_tensor_bytes(container, "w") == BASE.tobytes()


def test_two_tensors_that_would_share_a_side_tensor(tmp_path):
    """`w` with scales of columns beside `w_col`: both would have a side tensor `w_col_scale`."""
    source = write_source(tmp_path / "source", {"w": ("F32", BASE), "w_col": ("F32", BASE + 1)})
    convert(source, tmp_path / "plain", include=("*",))
    report = convert(source, tmp_path / "c", include=("*",), choice=ParamsChoice(provider()))
    assert [record.scheme for record in report.manifest.tensors] == ["int8", "lossless"]
    with Container(tmp_path / "c") as container:
        assert read_tensor_bytes(container, "w_col") == (BASE + 1).tobytes()


@pytest.mark.parametrize(
    ("matrix", "tile"),
    [
        ((576, 576), (576, 116)),
        ((1536, 576), (1536, 72)),
        ((4096, 4096), (256, 512)),
        ((49152, 576), (1820, 72)),
        ((64, 64), (64, 64)),
        ((1, 100_000), (1, 100_000)),
        ((100_000, 1), (100_000, 1)),
        ((100_000, 40), (3276, 40)),
    ],
)
def test_default_tiles_of_columns(matrix, tile):
    assert column_tiles(*matrix) == tile
    rows, cols = matrix
    assert -(-rows // tile[0]) * -(-cols // tile[1]) <= max_tiles(rows, cols)
