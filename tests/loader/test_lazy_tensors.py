"""Lazy tensors answer as a slice of a safetensors file does, and decode what is asked for."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError
from codecllm.loader.reader import TensorReader
from codecllm.loader.state_dict import KeptTensor, LazyTensor, lazy_state_dict, prefetch
from tests.malformed import builders


@pytest.fixture
def opened(tmp_path):
    with (
        Container(builders.make_container(tmp_path)) as container,
        closing(TensorReader(container, 1)) as reader,
    ):
        yield container, reader


def test_a_weight_describes_itself_without_being_read(opened):
    container, reader = opened
    values = lazy_state_dict(reader, container, torch.bfloat16)
    weight = values["q"]
    assert (weight.get_shape(), weight.get_dtype()) == ([24, 80], "BF16")
    assert (weight.dim(), weight.numel(), weight.is_floating_point()) == (2, 24 * 80, True)
    assert weight[...] is weight
    prefetch(reader, values)
    decoded = weight.to()
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, weight.shape)
    assert torch.equal(weight[3:5], decoded[3:5])
    # Rounded once, from the codes: float32 keeps more than bfloat16 does.
    assert torch.equal(weight.to(dtype=torch.float32).bfloat16(), decoded)


def test_codes_and_scales_have_shapes_and_dtypes_of_their_own(opened):
    container, reader = opened
    record = container.records["q"]
    codes = LazyTensor(reader, record, "codes", torch.bfloat16)
    scale = LazyTensor(reader, record, "scale", torch.bfloat16)
    columns = LazyTensor(reader, record, "col_scale", torch.bfloat16)
    assert (codes.get_dtype(), codes.get_shape()) == ("I8", [24, 80])
    assert (scale.get_dtype(), scale.get_shape(), columns.get_shape()) == ("F32", [24], [80])
    assert codes.request is not None and scale.request is None
    product = codes.to().float() * scale.to()[:, None]
    assert torch.equal(
        product, LazyTensor(reader, record, "weight", torch.bfloat16).to(dtype=torch.float32)
    )


def test_without_a_dtype_each_tensor_keeps_its_own(opened):
    container, reader = opened
    values = lazy_state_dict(reader, container, None)
    assert all(isinstance(value, KeptTensor) for value in values.values())
    assert (values["l"].get_dtype(), values["n"].get_dtype()) == ("BF16", "F32")
    assert torch.equal(values["n"][...], torch.linspace(0, 1, 9))
    assert values["n"].to(dtype=torch.float16).dtype == torch.float16


def test_a_float_for_an_integer_is_the_error_of_the_load(opened):
    container, reader = opened
    weight = lazy_state_dict(reader, container, torch.bfloat16)["l"]
    with pytest.raises(ModelMismatchError, match="dtype"):
        weight.to(dtype=torch.int32)
    assert isinstance(reader.first_error, ModelMismatchError)
