"""Column scales and wide codes: load, export, verify and diagnose work as for other models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from codecllm.api import export
from codecllm.converter import ParamsChoice, convert
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.reference import read_codes, read_tensor_bytes
from codecllm.formats.schemes.int8 import step_sizes
from codecllm.formats.shards.side_tensors import scale_bytes
from codecllm.info import describe
from codecllm.loader import from_pretrained, stream_tensors
from codecllm.loader.resident import int8_matmul
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.scaled_codes import ScaledCodes
from codecllm.verifier import verify
from codecllm.verifier.model_comparison import compare_models
from tests import tampering
from tests.integration import tiny_models
from tests.integration.outputs import coded_weights
from tests.stepped import WIDE, mixed, provider

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = torch.arange(1, 24)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("columns") / "source")


@pytest.fixture(scope="module", params=["zstd", "rans"])
def folder(request, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("columns") / "c"
    convert(
        source,
        out,
        include=("*.weight",),
        exclude=("*norm*",),
        codec=request.param,
        choice=ParamsChoice(mixed),
    )
    return out


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(input_ids=tokens).logits.float()


def test_every_path_gives_the_bits_of_the_reference(folder):
    dense = from_pretrained(folder)
    weights = dense.state_dict()
    with Container(folder) as container:
        assert container.records[WIDE].wide
        for name in container.records:
            expected = read_tensor_bytes(container, name)
            assert weights[name].contiguous().view(torch.uint8).numpy().tobytes() == expected, name
        for record, tensor in stream_tensors(container):
            assert torch.equal(tensor, weights[record.name])
    base = logits(dense)
    assert torch.equal(logits(from_pretrained(folder, resident="compressed")), base)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_rounded_once(folder, dtype):
    weights = from_pretrained(folder, dtype=dtype).state_dict()
    compressed = from_pretrained(folder, dtype=dtype, resident="compressed")
    with Container(folder) as container:
        for name in (WIDE, "model.layers.0.mlp.down_proj.weight"):
            tensor = container.tensor(name)
            steps = step_sizes(tensor.scales, tensor.columns.scales)
            expected = torch.from_numpy(read_codes(tensor).astype(np.float32) * steps).to(dtype)
            assert torch.equal(weights[name], expected)
            assert torch.equal(
                compressed.get_submodule(name.removesuffix(".weight")).weight, expected
            )


def test_int8_products_fold_the_columns_into_their_inputs(folder):
    dense, resident = from_pretrained(folder), from_pretrained(folder, resident="int8")
    coded = coded_weights(resident)
    assert WIDE not in coded  # 16 bits are no less than its dtype has
    assert len(coded) == 15
    assert coded["model.layers.0.self_attn.q_proj.weight"].form.matrix.col_scale is None
    weights = dense.state_dict()
    for name, weight in coded.items():
        assert torch.equal(weight, weights[name])
        assert weight.form.matrix.scale.dtype == torch.float32
    many = TOKENS.repeat(4, 1)  # more rows than the packed kernel takes
    assert torch.equal(logits(resident, many), logits(dense, many))
    few, expected = logits(resident, TOKENS[:, :2]), logits(dense, TOKENS[:, :2])
    assert (few - expected).abs().max() <= 0.02 * expected.abs().max()


def test_casts_leave_the_scales_alone(folder):
    module = (
        from_pretrained(folder, resident="int8")
        .model.layers[0]
        .mlp.down_proj.to(torch.float16)
        .double()
    )
    form = module.weight.form.matrix
    assert (form.scale.dtype, form.col_scale.dtype) == (torch.float32, torch.float32)
    with Container(folder) as container:
        tensor = container.tensor("model.layers.0.mlp.down_proj.weight")
        assert np.array_equal(form.col_scale.numpy(), tensor.columns.scales)


@pytest.mark.parametrize("tokens", [1, 5])
def test_packed_products_stay_within_the_stated_rounding(tokens):
    generator = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-127, 128, (64, 96), dtype=torch.int8, generator=generator)
    scale, columns = (torch.rand(size, generator=generator) + 0.1 for size in (64, 96))
    inputs = torch.randn(tokens, 96, generator=generator).to(torch.bfloat16)
    if not int8_matmul.can_pack(inputs, codes):
        pytest.skip("this CPU or torch has no packed kernel")
    got = int8_matmul.int8_product(inputs, codes, scale, None, columns)
    products = inputs.double()[:, None, :] * (
        codes.double() * scale.double()[:, None] * columns.double()
    )
    error = (got.double() - products.sum(-1)).abs()
    assert (error <= 2**-8 * (products.abs().sum(-1) + products.sum(-1).abs())).all()
    assert error.max() > 0


def test_gradients_know_the_columns():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (48, 96), dtype=torch.int8, generator=generator)
    scale, columns = (torch.rand(size, generator=generator) + 0.1 for size in (48, 96))
    inputs = torch.randn(3, 96, dtype=torch.float64, generator=generator).requires_grad_()
    weight = int8_matmul.dequantize_rows(codes, scale, torch.float64, columns)
    (expected,) = torch.autograd.grad((inputs @ weight.T).sum(), inputs)
    (got,) = torch.autograd.grad(
        Int8Form("w", ScaledCodes(codes, scale, columns)).linear(inputs, None).sum(), inputs
    )
    torch.testing.assert_close(got, expected)


def test_verify_judges_each_tensor_by_its_record(folder, source, tmp_path):
    report = verify(folder, source=str(source))
    assert report.ok, report.to_json()
    (stage,) = [stage for stage in report.stages if "rounded otherwise" in stage.summary]
    assert stage.facts["rounded_otherwise"] == 1
    assert 1 < stage.facts["their_worst_error_in_steps"] <= 1.51

    def edit(document):
        for record in document["tensors"]:
            if record.get("rounding") == "feedback":
                record["worst_steps"] = 1.2

    copy = tampering.copy_of(folder, tmp_path / "c")
    tampering.reseal(copy, edit)
    report = verify(copy, source=str(source))
    assert not report.ok
    assert "mlp.up_proj.weight" in report.to_json()

    def rename(document):
        for record in document["tensors"]:
            if record.get("rounding") == "feedback":
                record["rounding"] = "nearest"

    tampering.reseal(copy, rename)
    assert not verify(copy, source=str(source)).ok


def test_comparing_knows_the_steps(folder, source):
    rows = {row["name"]: row for row in compare_models(folder, source, run=False)["tensors"]}
    assert rows[WIDE]["relative_error"] < 0.01
    assert 0.01 < rows["model.layers.0.mlp.down_proj.weight"]["relative_error"] < 0.1


def test_a_plain_export_has_the_bits_of_dense_loading(folder, tmp_path):
    export(folder, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()
    for name, value in from_pretrained(folder).state_dict().items():
        assert torch.equal(plain[name], value), name


def test_exports_that_cannot_hold_columns_say_so(source, folder, tmp_path):
    convert(
        source,
        tmp_path / "c",
        include=("*.weight",),
        exclude=("*norm*",),
        choice=ParamsChoice(provider(0.1)),
    )
    for container in (tmp_path / "c", folder):  # in `folder` not all tensors have them
        with pytest.raises(UsageError, match=r"again with --no-column-scales.* scales of columns"):
            export(container, tmp_path / "packed", format="compressed-tensors")
    with pytest.raises(UsageError, match="scales for their columns"):
        export(tmp_path / "c", tmp_path / "gguf", format="gguf")
    assert not (tmp_path / "packed").exists()


def test_info_counts_every_scale(folder):
    facts = describe(folder)
    rows = {row["name"]: row for row in facts["tensors"]}
    assert rows[WIDE]["wide"]
    assert rows[WIDE]["column_scales"]
    assert not rows["model.layers.0.self_attn.q_proj.weight"]["column_scales"]
    with Container(folder) as container:
        record = container.records[WIDE]
        assert scale_bytes(record) == 2 * (128 + 64) + 64
        payload = sum(plane.stored_bytes for plane in record.planes)
        assert rows[WIDE]["stored_bytes"] == payload + (record.tables_bytes or 0) + scale_bytes(
            record
        )
