"""Every fault of the library is named by its cause, in its stage, with its tensor and channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import codecllm
from codecllm.converter import convert
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.verifier.diagnosis import Cause, diagnose
from codecllm.verifier.diagnosis.causes import explaining
from codecllm.verifier.diagnosis.codes.back_ends import BackEnd, present_back_ends
from codecllm.verifier.diagnosis.model import layer_outputs, layer_runs
from codecllm.verifier.report import Verdict
from tests import tampering
from tests.diagnosis import faults
from tests.integration import tiny_models

FAST = {
    "prompts": ["The capital", "1, 1, 2, 3,"],
    "text": "To be, or not to be, that is the question.",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_models.llama(tmp_path_factory.mktemp("source") / "llama")
    faults.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory, source):
    out = tmp_path_factory.mktemp("clean") / "c"
    convert(source, out, include=("*",))
    return out


@pytest.fixture
def copy(tmp_path, clean):
    return tampering.copy_of(clean, tmp_path / "c")


def _made_from(tmp_path, source, edit, **options):
    edited = faults.edit_source(source, tmp_path / "source", edit)
    convert(edited, tmp_path / "out", include=("*",), **options)
    return edited, tmp_path / "out"


def _found(report, stage, cause, tensor=None, channel=None):
    """Asserts the cause in a report, and that the paragraph names it."""
    explained = explaining(report)
    assert explained is not None, report.conclusion
    found, finding = explained
    assert (found.name, finding.cause) == (stage, cause), report.conclusion
    if tensor is not None:
        assert finding.error.tensor == tensor
        assert tensor in report.conclusion
    if channel is not None:
        assert finding.channel == channel
    assert report.conclusion.startswith(cause.value.capitalize())
    assert report.exit_code != 0
    return finding


def test_clean_container_has_no_finding(clean, source):
    report = diagnose(clean, source, **FAST)
    assert report.exit_code == 0, report.to_json()
    assert not any(stage.findings for stage in report.stages)
    assert report.conclusion.startswith("No fault found")
    ran = [stage.name for stage in report.stages if stage.verdict is Verdict.OK]
    assert ran == ["structure", "checksums", "round trip", "quantized", "loaded", "layers", "text"]


CONTAINER_FAULTS = [
    (faults.corrupt_payload, Cause.CORRUPTED_PAYLOAD, faults.UP, 37),
    (faults.shift_payload, Cause.SHIFTED, faults.UP, None),
    (faults.swap_scales, Cause.SWAPPED_SCALES, faults.UP, 5),
    (faults.fp16_scales, Cause.ROUNDED_SCALES, faults.UP, 0),
    (faults.swap_heads, Cause.HEAD_ORDER, faults.KEYS, 0),
    (faults.interleave_heads, Cause.HEAD_ORDER, faults.SQUARE, 1),
]


@pytest.mark.parametrize(
    ("fault", "cause", "tensor", "channel"),
    CONTAINER_FAULTS,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_of_a_container(copy, source, fault, cause, tensor, channel):
    fault(copy)
    _found(diagnose(copy, source, **FAST), "round trip", cause, tensor, channel)


def test_corrupted_payload_is_placed(copy, source):
    faults.corrupt_payload(copy)
    finding = _found(diagnose(copy, source, **FAST), "round trip", Cause.CORRUPTED_PAYLOAD)
    path, byte = tampering.payload_place(copy, faults.UP)
    assert (finding.error.file, finding.error.chunk, finding.error.byte) == (path.name, 0, byte)
    assert "3 of 8192 codes differ, first at row 37, column 5" in finding.error.message


def test_head_orders_are_described(copy, source):
    faults.swap_heads(copy)
    faults.interleave_heads(copy)
    (stage,) = [one for one in diagnose(copy, source, **FAST).stages if one.name == "round trip"]
    texts = {finding.error.tensor: finding.error.message for finding in stage.findings}
    assert "whole heads of 16 rows, in the order [1, 0]" in texts[faults.KEYS]
    assert (
        "inside each head of 16 rows, in the order [0, 8, 1, 9, 2, 10, 3, 11]"
        in texts[faults.SQUARE]
    )


def test_a_step_ten_times_too_coarse(copy, source):
    faults.coarse_step(copy, source)
    report = diagnose(copy, source, **FAST)
    finding = _found(report, "round trip", Cause.COARSE_STEP, faults.UP, 0)
    assert "10 times" in finding.error.message
    departure = next(stage for stage in report.stages if stage.name == "layers").facts[
        "first_departure"
    ]
    assert departure["module"] == faults.UP.removesuffix(".weight")


def test_an_outlier_that_crushes_a_per_tensor_scale(tmp_path, source):
    edited, out = _made_from(tmp_path, source, faults.outlier)
    faults.per_tensor_scale(out, edited)
    finding = _found(
        diagnose(out, edited, **FAST), "round trip", Cause.PER_TENSOR_SCALE, faults.UP, 17
    )
    assert "codes up to 0 of 127" in finding.error.message


def test_a_stored_scale_that_overflowed(tmp_path, source):
    edited, out = _made_from(tmp_path, source, faults.large_channel)
    faults.fp16_scales(out)
    report = diagnose(out, edited, **FAST)
    finding = _found(report, "round trip", Cause.SCALE_OVERFLOW, faults.UP, 21)
    assert "float16 ends at 65504" in finding.error.message
    assert {one.name: one.verdict for one in report.stages}["loaded"] is Verdict.SKIPPED


def test_a_channel_of_nan(tmp_path, source):
    edited, out = _made_from(tmp_path, source, faults.nan_channel, non_finite="lossless")
    finding = _found(diagnose(out, edited, **FAST), "quantized", Cause.NON_FINITE, faults.UP, 12)
    assert "64 in 1 rows" in finding.error.message


def test_a_source_of_another_revision(tmp_path, clean, source):
    other = faults.edit_source(source, tmp_path / "other", faults.other_revision)
    finding = _found(diagnose(clean, other, **FAST), "round trip", Cause.OTHER_REVISION)
    assert "the container agrees with its own digest" in finding.error.message


def test_another_revision_of_a_lossless_container(tmp_path, source):
    convert(source, tmp_path / "out", scheme="lossless")
    other = faults.edit_source(source, tmp_path / "other", faults.other_revision)
    _found(diagnose(tmp_path / "out", other, **FAST), "round trip", Cause.OTHER_REVISION)


def test_a_source_of_another_model(clean, tiny):
    _found(diagnose(clean, tiny("gpt2"), **FAST), "round trip", Cause.OTHER_MODEL)


LOADER_FAULTS = [
    (faults.scales_along_wrong_axis, None, Cause.SCALE_AXIS, faults.SQUARE, 0),
    (faults.scales_twice, None, Cause.REPLACED_TWICE, faults.UP, 0),
    (faults.no_scales, None, Cause.SCALE_NOT_APPLIED, faults.UP, 0),
    (faults.shifted_decoder, None, Cause.SHIFTED, faults.UP, 0),
    (faults.random_layer, None, Cause.NOT_REPLACED, faults.UP, None),
    (faults.swapped_loaded_heads, None, Cause.HEAD_ORDER, faults.KEYS, 0),
    (faults.swapped_loaded_scales, None, Cause.SWAPPED_SCALES, faults.UP, 5),
    (faults.wrong_tensor, None, Cause.WRONG_TENSOR, faults.UP, None),
    (faults.on_meta, None, Cause.ON_META, None, None),
    (faults.untied, None, Cause.NOT_TIED, None, None),
    (faults.plain_module, "int8", Cause.NOT_REPLACED, None, None),
    (faults.plain_module, "compressed", Cause.NOT_REPLACED, None, None),
    (faults.replaced_twice, "int8", Cause.REPLACED_TWICE, None, None),
    (faults.fp16_module_scales, "int8", Cause.ROUNDED_SCALES, None, None),
]


@pytest.mark.parametrize(
    ("fault", "only", "cause", "tensor", "channel"),
    LOADER_FAULTS,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_of_a_loader(clean, source, fault, only, cause, tensor, channel):
    load = faults.loading(fault, only=only or "dense")
    finding = _found(diagnose(clean, source, load=load, **FAST), "loaded", cause, tensor, channel)
    if tensor is None and fault is not faults.untied:
        assert finding.module == faults.UP.removesuffix(".weight")


def test_scales_that_overflow_in_the_loader(tmp_path, source):
    edited, out = _made_from(tmp_path, source, faults.large_channel)
    for broken, only in (
        (faults.scales_through_fp16, "dense"),
        (faults.fp16_module_scales, "int8"),
    ):
        report = diagnose(out, edited, load=faults.loading(broken, only=only), **FAST)
        finding = _found(report, "loaded", Cause.SCALE_OVERFLOW, channel=21)
        assert finding.module == faults.UP.removesuffix(".weight")


@pytest.mark.parametrize("resident", ["dense", "int8", "compressed"])
def test_weights_are_right_and_the_computation_is_not(clean, source, resident):
    for fault, cause, channel, module in (
        (faults.stale_kv_layout, Cause.HEAD_ORDER, None, faults.KEYS),
        (faults.scaled_output, Cause.COMPUTATION, 29, faults.UP),
    ):
        report = diagnose(
            clean, source, load=faults.loading(fault, only=resident), resident=resident, **FAST
        )
        finding = _found(report, "layers", cause, channel=channel)
        assert finding.module == module.removesuffix(".weight")
        assert "'model.layers.1'" in finding.error.message


def test_a_prompt_of_few_tokens_is_no_finding_under_resident_int8(clean, source, monkeypatch):
    monkeypatch.setattr(layer_runs, "PROMPT_TOKENS", 16)
    report = diagnose(clean, source, resident="int8", **FAST)
    layers_stage = next(stage for stage in report.stages if stage.name == "layers")
    assert report.ok and "first_departure" not in layers_stage.facts
    assert [
        layer_outputs.slack_for(*case) > 1 for case in (("int8", 32), ("int8", 33), ("dense", 16))
    ] == [True, False, False]


@pytest.mark.parametrize("resident", ["dense", "int8", "compressed"])
def test_a_cache_whose_layout_is_stale(clean, source, resident):
    """The whole prompt at once is right; only tokens that come one at a time meet the cache."""
    order = (
        Cause.CACHE if resident == "int8" else Cause.HEAD_ORDER
    )  # the kernel for few rows rounds differently
    for fault, cause, module in (
        (faults.stale_cache, Cause.CACHE, "model.layers.1.self_attn"),
        (faults.late_key_heads, order, faults.KEYS.removesuffix(".weight")),
    ):
        report = diagnose(
            clean, source, load=faults.loading(fault, only=resident), resident=resident, **FAST
        )
        finding = _found(report, "layers", cause)
        assert finding.module == module
        assert "only where tokens come one at a time" in finding.error.message
        assert all(row["off_reference"] < 1e-2 for row in report.stage("layers").facts["layers"])


def test_rounding_of_the_kernel_for_few_rows_is_no_departure():
    """As SmolLM2 under resident int8: one channel far off, the whole output by 4 %."""
    right = torch.ones(6, 512)
    found = right.clone()
    found[:, 7] *= 1.9
    runs = [layer_runs.Run({"mlp": value}, value) for value in (right, found)]
    assert layer_outputs.first_departure(*runs, torch.bfloat16) == "mlp"
    assert (
        layer_outputs.first_departure(*runs, torch.bfloat16, layer_outputs.FEW_ROWS_SLACK) is None
    )
    found *= 1.3
    assert (
        layer_outputs.first_departure(*runs, torch.bfloat16, layer_outputs.FEW_ROWS_SLACK) == "mlp"
    )


def test_what_attention_computes_itself_is_not_blamed_on_a_module_in_it(clean, source):
    finding = _found(
        diagnose(clean, source, load=faults.loading(faults.attention_scaled, only="dense"), **FAST),
        "layers",
        Cause.COMPUTATION,
    )
    assert finding.module == "model.layers.1.self_attn"
    assert "the input of 'model.layers.1.self_attn.o_proj'" in finding.error.message


def test_a_layer_that_still_holds_the_source(tmp_path, source):
    edited, out = _made_from(tmp_path, source, lambda tensors: None)
    load = faults.loading(faults.keeps_source_weight, only="dense")
    finding = _found(
        diagnose(out, edited, load=load, **FAST), "loaded", Cause.NOT_REPLACED, faults.UP
    )
    assert "the source's own weight" in finding.error.message


def test_a_decode_back_end_that_returns_a_shifted_buffer(clean, source):
    good = present_back_ends()[0]

    def late(tensor, index):
        words = good.decode(tensor, index)
        return np.roll(words, 1) if tensor.record.name == faults.UP else words

    back_ends = [good, BackEnd("late", "0.1", good.takes, late)]
    finding = _found(
        diagnose(clean, source, back_ends=back_ends, **FAST), "round trip", Cause.SHIFTED, faults.UP
    )
    assert "'late' (0.1)" in finding.error.message
    assert "-1 elements away" in finding.error.message


def test_a_decode_back_end_that_is_wrong_or_fails(clean, source):
    good = present_back_ends()[0]

    def fails(tensor, index):
        raise RuntimeError("no device")

    wrong = BackEnd("wrong", "1", good.takes, lambda tensor, index: good.decode(tensor, index) ^ 1)
    finding = _found(
        diagnose(clean, source, back_ends=[wrong], **FAST), "round trip", Cause.BACK_END
    )
    assert "differs from the reference" in finding.error.message
    finding = _found(
        diagnose(clean, source, back_ends=[BackEnd("b", "1", good.takes, fails)], **FAST),
        "round trip",
        Cause.BACK_END,
    )
    assert "RuntimeError: no device" in finding.error.message


def test_a_wrong_tokenizer(tmp_path, copy, source):
    other = tmp_path / "other"
    other.mkdir()
    faults.write_tokenizer(other, shifted=True)
    tampering.replace_listed(copy, "tokenizer.json", (other / "tokenizer.json").read_bytes())
    finding = _found(diagnose(copy, source, **FAST), "text", Cause.WRONG_TOKENIZER)
    assert finding.error.file == "tokenizer.json"
    assert "from token 0 on" in finding.error.message


def test_a_model_that_does_not_load(clean, source):
    def load(folder, *, resident):
        raise ValueError("no\nsuch thing")

    report = diagnose(clean, source, load=load, **FAST)
    finding = _found(report, "loaded", Cause.LOAD_FAILED)
    assert "ValueError: no such thing" in finding.error.message
    assert report.stages[-2].verdict is Verdict.SKIPPED


def test_a_flipped_bit_is_a_damaged_container(copy, source):
    tampering.flip_bit(*tampering.payload_place(copy, faults.UP))
    report = diagnose(copy, source, **FAST)
    finding = _found(report, "round trip", Cause.DAMAGED, faults.UP)
    assert (finding.error.tensor, finding.error.chunk) == (faults.UP, 0)


def test_first_layers_separates_a_broken_layer(clean, source):
    """With only layer 0 from the container a fault in layer 1 does not reach the text."""
    load = faults.loading(lambda model, folder: model.get_parameter(faults.UP).mul_(-30))
    values = {}
    for layers in (1, 2):
        report = diagnose(clean, source, load=load, first_layers=layers, **FAST)
        text = next(stage for stage in report.stages if stage.name == "text")
        assert text.facts["first_layers"] == layers
        values[layers] = text.facts["mean_kl"]
    bisect = next(stage for stage in report.stages if stage.name == "layers").facts["bisect"]
    assert [row["layers"] for row in bisect] == [0, 1, 2]
    assert bisect[0]["value"] == 0
    assert values[2] > 20 * values[1]
    assert bisect[2]["value"] > 20 * bisect[1]["value"]


def test_a_baseline_that_is_not_met(tmp_path, source):
    codecllm.convert(source, tmp_path / "out", include=("*",), baseline=True)
    report = diagnose(
        tmp_path / "out", source, load=faults.loading(faults.negated_logits, only="dense")
    )
    assert _found(report, "layers", Cause.COMPUTATION).module == "lm_head"
    stage = report.stage("baseline")
    assert stage.findings
    assert "as recorded" not in stage.summary
    assert {finding.cause for finding in stage.findings} == {Cause.TEXT_DIFFERS}
    assert diagnose(tmp_path / "out", source).exit_code == 0


def test_manifest_of_the_library_is_int8(clean):
    from codecllm.formats.container import Container

    with Container(clean) as container:
        assert all(
            isinstance(container.records[name], Int8Tensor)
            for name in (faults.UP, faults.KEYS, faults.SQUARE)
        )
    assert torch.get_num_threads() >= 1
