"""The operations in which a coded weight differs from decoding it and going on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from codecllm.formats.errors import UsageError
from codecllm.loader.resident.cell import Cell, cut
from codecllm.loader.resident.coded_weight import (
    CodedWeight,
    add_view,
    alias,
    coded,
    coded_parameter,
    plain_copy,
    read,
    settle,
    write,
)
from codecllm.loader.resident.form import WeightForm, refuse_graphs
from codecllm.loader.resident.handlers import ABOVE_AUTOGRAD, BELOW_AUTOGRAD
from codecllm.loader.resident.joined_form import concatenated, stacked

aten = torch.ops.aten


def _usual(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation as torch does for any tensor: `__torch_dispatch__` comes next."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _linear(
    func: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    if options or not isinstance(weight, CodedWeight):
        return _usual(func, input, weight, bias, **options)
    form = weight.matrix
    if form is None or len(form.shape) != 2:
        return _usual(func, input, weight, bias)
    if isinstance(input, CodedWeight) or isinstance(bias, CodedWeight):
        return _usual(func, input, weight, bias)
    refuse_graphs(form)
    # The weight itself would be asked by way of `__torch_function__`, some microseconds each time.
    inputs, values_dtype = input, weight._cell.dtype
    kind = input.device.type
    is_cast = input.is_floating_point() and input.dtype != torch.float64
    if torch.is_autocast_enabled(kind) and is_cast:
        inputs = input.to(torch.get_autocast_dtype(kind))
        bias = bias if bias is None else bias.to(inputs.dtype)
        if values_dtype == torch.float32:
            values_dtype = inputs.dtype
    if inputs.dtype != values_dtype or (bias is not None and bias.dtype != values_dtype):
        return _usual(func, input, weight, bias)  # as of a dense layer: mostly an error of torch
    return form.linear(inputs, bias)


def _embedding(
    func: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    form = weight.form if isinstance(weight, CodedWeight) else None
    if form is not None:
        refuse_graphs(form)  # before any size is looked at: in a graph it may have no value
    is_usual = input.dtype in (torch.int32, torch.int64) and (
        padding_idx is None or -weight.shape[0] <= padding_idx < weight.shape[0]
    )
    if form is None or max_norm is not None or not is_usual:  # mostly an error of torch
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return _usual(func, input, weight, *options)
    vectors = form.gather(input.reshape(-1), weight.dtype, weight.device)
    return vectors.view(*input.shape, weight.shape[1])


def _getitem(func: Any, weight: CodedWeight, index: Any) -> Any:
    """One matrix of a stack is a view, by a number in a tensor too: torch would decode all."""
    is_number = isinstance(index, torch.Tensor) and index.dim() == 0
    if is_number and index.dtype == torch.int64 and weight.form is not None and weight.dim() == 3:
        return weight.select(0, int(index))
    return _usual(func, weight, index)


def _requires_grad_(func: Any, weight: CodedWeight, requires_grad: bool = True) -> Any:
    if requires_grad and not weight._views:
        write(weight, "is to be trained")
        if isinstance(weight, nn.Parameter):  # others may be on the way to one: see nn.Parameter
            settle(weight)
    return _usual(func, weight, requires_grad)


def _set_data(func: Any, weight: torch.Tensor, value: torch.Tensor) -> None:
    form = value.form if isinstance(value, CodedWeight) else None
    if isinstance(weight, CodedWeight):
        if form is None:
            write(weight, "was given other values")
    elif form is None:  # the weight was dense, and is plain since this call began
        _usual(func, weight, read(value))
        return
    if settle(weight, read(value) if form is None else value):
        return
    if not isinstance(weight, CodedWeight):
        _usual(func, weight, read(value))
        return
    facts = (value.shape, value.dtype, value.device)
    if weight._views or facts != (weight.shape, weight.dtype, weight.device):
        raise UsageError(
            "a weight that other code holds (a compiled function, a graph of autograd) keeps "
            "shape, dtype and device",
            got=facts,
            expected=(weight.shape, weight.dtype, weight.device),
        )
    if isinstance(value, CodedWeight):
        weight._cell = value._cell
    else:
        weight._cell = Cell(None, weight.dtype, weight.device)
        weight._cell.dense = value.detach()


def _element_size(func: Any, weight: CodedWeight) -> Any:
    """Bytes that an element of a parameter takes in memory, a fraction mostly.

    Tools multiply it by the number of elements.
    """
    form = weight.form
    if form is None or not isinstance(weight, nn.Parameter) or not weight.numel():
        return _usual(func, weight)
    return form.nbytes / weight.numel()


def _nbytes(func: Any, weight: CodedWeight) -> Any:
    form = weight.form
    if form is None or not isinstance(weight, nn.Parameter):
        return _usual(func, weight)
    return form.nbytes


def _readable(weight: CodedWeight) -> torch.Tensor:
    """Returns the decoded values.

    A tensor that is asked for its memory keeps them as long as it lives. Aliases of one weight
    share them, so that others can tell that they are tied; one matrix of a stack is read alone.
    """
    if weight._views and weight.matrix is not None:
        if weight._read_copy is None:
            weight._read_copy = plain_copy(weight)
        return weight._read_copy
    weight._read_copy = weight._cell.shared_copy()
    return cut(weight._read_copy, weight._views)


class Address(int):
    """The address of a coded parameter.

    Nothing can be read there, and only the same weight has an equal address.
    """

    cell: Cell

    def __eq__(self, other: object) -> bool:
        return self.cell is other.cell if isinstance(other, Address) else other == 0

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return id(self.cell)


def _data_ptr(func: Any, weight: CodedWeight) -> int:
    """Of a parameter an address that only tells weights apart.

    Of aliases and parts that of their decoded values.
    """
    form = weight._cell.form
    if form is None or not (isinstance(weight, nn.Parameter) or form.in_compiler):
        return _readable(weight).data_ptr()
    address = Address(0)
    address.cell = weight._cell
    return address


def _untyped_storage(func: Any, weight: CodedWeight) -> Any:
    """Of a parameter one that torch refuses to read.

    Of aliases and parts that of their decoded values.
    """
    form = weight._cell.form
    if form is not None and (isinstance(weight, nn.Parameter) or form.in_compiler):
        return _usual(func, weight)
    return func(_readable(weight))


def _storage(func: Any, weight: CodedWeight, *args: Any, **kwargs: Any) -> Any:
    if isinstance(weight, nn.Parameter) and weight.form is not None:
        raise UsageError(
            "a coded weight has no storage to be read or written: weight.detach() has one with the "
            "decoded values, as the tensors of model.state_dict() have",
            tensor=weight.form.name,
        )
    return func(_readable(weight), *args, **kwargs)


def _list(func: Any, weight: CodedWeight) -> Any:
    return func(plain_copy(weight))


def _array(func: Any, weight: CodedWeight, *args: Any, **kwargs: Any) -> Any:
    """An array of the decoded values, which refuses writes: they would not reach the weight."""
    dense = weight._cell.dense is not None
    array = func(read(weight) if dense else plain_copy(weight), *args, **kwargs)
    array.flags.writeable = dense and array.flags.writeable
    return array


def _shared_memory(func: Any, weight: CodedWeight, *args: Any, **kwargs: Any) -> Any:
    """Hands out memory that others may write to: that of the weight itself."""
    return func(write(weight, "was given to another library"), *args, **kwargs)


def _share_memory_(func: Any, weight: CodedWeight) -> Any:
    form = weight._cell.form
    held = [weight._cell.dense] if form is None else form.held_tensors().values()
    for tensor in held:
        if tensor is not None:
            tensor.share_memory_()
    return weight


def _is_shared(func: Any, weight: CodedWeight) -> bool:
    form = weight._cell.form
    held = [weight._cell.dense] if form is None else form.held_tensors().values()
    return all(tensor.is_shared() for tensor in held if tensor is not None)


ABOVE_AUTOGRAD.update(
    {
        functional.linear: _linear,
        functional.embedding: _embedding,
        torch.Tensor.__getitem__: _getitem,
        torch.Tensor.requires_grad_: _requires_grad_,
        torch.Tensor.requires_grad.__set__: _requires_grad_,  # type: ignore[attr-defined]
        torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
        torch.Tensor.element_size: _element_size,
        torch.Tensor.nbytes.__get__: _nbytes,  # type: ignore[attr-defined]
        torch.Tensor.data_ptr: _data_ptr,
        torch.Tensor.untyped_storage: _untyped_storage,
        torch.Tensor.storage: _storage,
        torch.Tensor._typed_storage: _storage,
        torch.Tensor.numpy: _array,
        torch.Tensor.__array__: _array,
        torch.Tensor.tolist: _list,
        torch.Tensor.__dlpack__: _shared_memory,
        torch.Tensor.share_memory_: _share_memory_,
        torch.Tensor.is_shared: _is_shared,
    }
)


def _alias(func: Any, weight: CodedWeight) -> Any:
    return alias(weight)


def _clone(func: Any, weight: CodedWeight, **kwargs: Any) -> Any:
    form, cell = weight.form, weight._cell
    return NotImplemented if form is None else coded(form, cell.dtype, cell.device)


def _to_copy(
    func: Any,
    weight: CodedWeight,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **kwargs: Any,
) -> Any:
    form = weight.form
    dtype = dtype or weight.dtype
    place = weight.device if device is None else torch.device(device)
    if place.type == "meta":
        return torch.empty(weight.shape, dtype=dtype, device=place)
    if form is None or not dtype.is_floating_point or dtype.itemsize < 2:
        return NotImplemented
    return coded(form.moved(place), dtype, place)


def _copy_(func: Any, target: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    both = isinstance(target, CodedWeight) and isinstance(source, CodedWeight)
    if not (both and target.form is not None and source.form is not None):
        return NotImplemented
    if target.shape != source.shape or target.dtype != source.dtype:
        return NotImplemented
    target._cell.take(source._cell)
    return target


def join(tensors: Sequence[Any], form: WeightForm | None) -> Any:
    """Returns a parameter of a joined form.

    Only what a load joins stays coded. Its tensors are marked (`is_loading`), and so is the result.
    """
    if form is None:
        return NotImplemented
    weight = coded_parameter(form, tensors[0].dtype, tensors[0].device)
    weight.is_loading = True
    return weight


def _forms_to_join(tensors: Sequence[Any]) -> list[WeightForm]:
    """Returns the forms of tensors that a load joins; none where one of them is another."""
    forms = [
        tensor.form
        for tensor in tensors
        if isinstance(tensor, CodedWeight) and tensor.is_loading and tensor.form is not None
    ]
    alike = len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
    return forms if alike and len(forms) == len(tensors) else []


def _stack(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    forms = _forms_to_join(tensors)
    return join(tensors, stacked(forms) if forms and dim == 0 else None)


def _cat(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    forms = _forms_to_join(tensors)
    return join(tensors, concatenated(forms, dim) if forms else None)


def _like(func: Any, weight: CodedWeight, *args: Any, **kwargs: Any) -> Any:
    """Makes a tensor of the weight's kind without decoding it."""
    kwargs.setdefault("device", weight.device)
    outline = torch.empty_strided((), (), dtype=weight.dtype, device=weight.device)
    return func(outline.expand(weight.shape), *args, **kwargs)


def _reshaped(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Gives this one object another shape: after `t_()` it is what `t()` gives."""
    if not isinstance(weight, CodedWeight):
        return NotImplemented
    add_view(weight, getattr(aten, func.overloadpacket.__name__.removesuffix("_")), args, kwargs)
    # Shape and strides of the object: the memory behind them is none.
    with torch._C._DisableTorchDispatch():
        func(weight, *args, **kwargs)
    return weight


def _detach_(func: Any, weight: CodedWeight) -> Any:
    return weight


def _given_memory(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, CodedWeight):
        return NotImplemented
    form = weight._cell.form
    raise UsageError(
        "a coded weight keeps its memory: set_() and resize_() take a clone of it",
        tensor=None if form is None else form.name,
    )


def _overloads(*packets: Any) -> list[Any]:
    return [getattr(packet, name) for packet in packets for name in packet.overloads()]


BELOW_AUTOGRAD |= dict.fromkeys(
    _overloads(aten.t_, aten.transpose_, aten.squeeze_, aten.unsqueeze_, aten.as_strided_),
    _reshaped,
)
BELOW_AUTOGRAD |= dict.fromkeys(_overloads(aten.set_, aten.resize_, aten.resize_as_), _given_memory)
BELOW_AUTOGRAD.update(
    {
        aten.detach_.default: _detach_,
        aten.detach.default: _alias,
        aten.alias.default: _alias,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.copy_.default: _copy_,
        aten.stack.default: _stack,
        aten.cat.default: _cat,
        aten.empty_like.default: _like,
        aten.zeros_like.default: _like,
        aten.ones_like.default: _like,
        aten.new_empty.default: _like,
        aten.new_zeros.default: _like,
    }
)
