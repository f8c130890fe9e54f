"""The weight of a module as a tensor whose values are coded.

Reads decode, and the first write makes it a plain tensor.

Nothing is lost between the two. An alias (`weight.data`, `weight.detach()`) shares one cell with
the weight, and a view (`weight[2:5]`, `weight.T`) remembers how it was cut: a write to any of them
decodes the whole weight once, into the cell, and is done there. From then on the parameter itself
is a plain `nn.Parameter`, also for an optimizer or a tied module that holds it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from codecllm.loader.resident.cell import Cell, Cut, View, cut, has_history, selected
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.handlers import ABOVE_AUTOGRAD, BELOW_AUTOGRAD

_LOG = logging.getLogger(__name__)
_OWN = ("_cell", "_views", "_is_param", "_read_copy", "is_loading")
_reported: set[tuple[str, str]] = set()


class CodedWeight(torch.Tensor):
    """A weight with true shape, dtype and device whose memory is a `WeightForm`.

    As an `nn.Parameter` (`coded_parameter`) it has no gradient. `functional.linear` and
    `functional.embedding` use the form; every other operation gets the decoded values, [rows, cols]
    of the weight's dtype. `requires_grad_()`, in-place operations and `weight.data = other` make
    the parameter plain and dense, which is logged.

    A cast of the whole weight is decoded anew, so that each value is rounded once: `.to(float32)`
    of a bfloat16 weight of scheme `int8` is the float32 product of code and scale.
    """

    _cell: Cell
    _views: tuple[View, ...]
    _is_param: bool
    _read_copy: torch.Tensor | None
    is_loading = False
    """Whether a load is joining it with others; see `operations.join`."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Any:
        """Returns a parameter of `data`, coded or plain.

        Code that rebuilds parameters calls their class this way.
        """
        return nn.Parameter(data, requires_grad=requires_grad)

    @property
    def form(self) -> WeightForm | None:
        """The form, or None where this is a part of a weight or its memory is plain."""
        return None if self._views else self._cell.form

    @property
    def matrix(self) -> WeightForm | None:
        """The form of the matrix that this is: a whole weight, or one of a stack (`weight[3]`)."""
        form = self._cell.form
        if form is None or len(self._views) != 1:
            return self.form
        number = selected(self._views[0])
        return None if number is None else form.member(number)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the handlers of `operations.py`, for all other functions the function itself."""
        return _again_if_settled(_call_function, func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without a class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator: aliases and views stay coded, writes make the weight dense.

        All else reads decoded values.
        """
        return _again_if_settled(_call_operator, func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Tells a compiler of the tensors in it: those of the form, or the plain one."""
        form = self.form
        names = ["plain"]
        facts = None
        if form is not None:
            tensors, facts = form.parts()
            names = list(tensors)
        kind = None if form is None else type(form)
        return names, (kind, facts, self.dtype, self.device, "_is_param" in self.__dict__)

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, torch.Tensor], facts: Any, size: Any, stride: Any
    ) -> torch.Tensor:
        """Makes the tensor again from the tensors that a compiler gives back."""
        kind, form_facts, dtype, device, is_param = facts
        if kind is None:
            return tensors["plain"]
        weight = coded(kind.from_parts(tensors, form_facts), dtype, device)
        if is_param:
            weight._is_param = True
        return weight

    def __getattr__(self, name: str) -> Any:
        """Finds the tensors that `__tensor_flatten__` names."""
        cell = self.__dict__.get("_cell")
        if cell is not None and name == "plain":
            return read(self)
        form = self.form if cell is not None else None
        tensors = form.parts()[0] if form is not None and not name.startswith("_") else {}
        if name not in tensors:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return tensors[name]

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # torch types its option
        """Names the form; values are not decoded to be printed."""
        form = self._cell.form
        memory = "dense" if form is None else f"{form.kind}, {form.nbytes} bytes of {form.name}"
        part = "part of " if self._views else ""
        return (
            f"{type(self).__name__}({part}{memory}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Returns a weight of its own that shares the form until one of the two is written to."""
        with torch._C.DisableTorchFunctionSubclass():
            is_leaf, trains = self.is_leaf, self.requires_grad
        if not is_leaf:
            super().__deepcopy__(memo)  # torch refuses it
        if id(self) not in memo:
            twin = plain_copy(self) if self.form is None else _copied(self)
            if isinstance(self, nn.Parameter) and not isinstance(twin, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=False)
            memo[id(self)] = twin.requires_grad_(trains)
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the form of a parameter; anything else, such as its alias, as a plain tensor.

        A state dict holds aliases, and its file is that of a plain model: of tied weights one copy.
        """
        form = self.form
        if form is None:
            return plain_copy(self).__reduce_ex__(protocol)
        if isinstance(self, nn.Parameter):
            return _restored, (form, self.dtype, str(self.device))
        self._read_copy = self._cell.shared_copy()  # held, so that the next alias gets the same
        return self._read_copy.__reduce_ex__(protocol)


def _again_if_settled(call: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls once more where another thread's first write made an argument plain meanwhile."""
    before = _coded_arguments(args, kwargs)
    try:
        return call(func, args, kwargs)
    except AttributeError:  # a plain parameter has neither cell nor views
        if _coded_arguments(args, kwargs) == before:
            raise
    return call(func, args, kwargs)


def _coded_arguments(args: Any, kwargs: dict[str, Any]) -> int:
    values = (*args, *kwargs.values())
    return sum(isinstance(value, CodedWeight) for value in values)


def _call_function(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    handler = ABOVE_AUTOGRAD.get(func)
    is_direct = False
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, CodedWeight):
            if argument._cell.dense is not None:
                settle(argument)  # mostly no CodedWeight any more
            is_direct = is_direct or isinstance(argument, CodedWeight)
    if handler is not None and is_direct:
        return handler(func, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _call_operator(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    handler = BELOW_AUTOGRAD.get(func)
    if handler is not None:
        result = handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    decomposed = func.decompose(*args, **kwargs)
    if decomposed is not NotImplemented:
        return decomposed
    if _makes_views(func) and isinstance(args[0], CodedWeight):
        return _views_of(args[0], func, args, kwargs)
    return _run_decoded(func, args, kwargs)


def coded(form: WeightForm, dtype: torch.dtype, device: torch.device) -> CodedWeight:
    """Returns a weight of its own with the values of a form: `dtype` on `device`."""
    return _wrap(Cell(form, dtype, device), (), torch.empty(form.shape, dtype=dtype, device="meta"))


def coded_parameter(form: WeightForm, dtype: torch.dtype, device: torch.device) -> CodedWeight:
    """Returns `coded` as an nn.Parameter without gradient."""
    parameter: Any = nn.Parameter(coded(form, dtype, device), requires_grad=False)
    assert isinstance(parameter, CodedWeight)
    return parameter


def read(weight: torch.Tensor) -> torch.Tensor:
    """Returns the values of a coded weight, or of a part, decoded; a plain tensor as it is."""
    if not isinstance(weight, CodedWeight):
        return weight
    cell, matrix = weight._cell, weight.matrix
    if matrix is not None:
        return matrix.dense(cell.dtype, cell.device)
    return cut(cell.read(), weight._views)


def plain_copy(weight: CodedWeight) -> torch.Tensor:
    """Returns the values as a plain tensor in memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        values = read(weight)
        return values.clone() if weight._views or weight._cell.dense is not None else values


def write(weight: CodedWeight, reason: str) -> torch.Tensor:
    """Makes the weight dense, and logs that.

    Returns the tensor, or the part of it, to be written to.
    """
    form = weight._cell.form
    dense = weight._cell.become_dense()
    if form is not None and (weight._cell.is_parameter or isinstance(weight, nn.Parameter)):
        grown = (
            f"resident {form.kind!r}: tensor {form.name!r} {reason} "
            "and lies dense in memory from now on: "
            f"{dense.nbytes} bytes, before {form.nbytes}"
        )
        first = (form.kind, reason) not in _reported
        _reported.add((form.kind, reason))
        _LOG.log(logging.WARNING if first else logging.DEBUG, grown)
    return cut(dense, weight._views)


def settle(weight: torch.Tensor, replacement: torch.Tensor | None = None) -> bool:
    """Turns the object into a plain tensor over its dense memory, or over `replacement`.

    Returns whether that was possible.

    It cannot while other code holds the memory behind the object (a compiled function, a graph of
    autograd), nor where autograd knows more of the object than a new one could tell: then it stays
    a `CodedWeight` whose operations all run on the dense memory.
    """
    if has_history(weight):
        return False
    if replacement is None:
        if not isinstance(weight, CodedWeight):  # another thread has done it
            return True
        with torch.no_grad():
            replacement = cut(weight._cell.become_dense(), weight._views)
    is_param = isinstance(weight, nn.Parameter)
    with torch._C.DisableTorchFunctionSubclass():
        other: torch.Tensor = replacement.detach()
        if is_param:
            other = nn.Parameter(other, requires_grad=weight.requires_grad)
        elif weight.requires_grad:
            other.requires_grad_()
        extras = {key: value for key, value in weight.__dict__.items() if key not in _OWN}
        try:
            torch.utils.swap_tensors(weight, other)
        except RuntimeError:
            return False
    weight.__dict__.update(extras)
    return True


def make_plain(model: nn.Module) -> None:
    """Makes every coded parameter of a model plain, in place, and lets it be trained."""
    for weight in list(model.parameters()):
        if isinstance(weight, CodedWeight):
            settle(weight)  # in place: tied modules hold it too
            weight.requires_grad_(True)


def alias(weight: CodedWeight) -> CodedWeight:
    """Returns another tensor over the same cell, cut in the same way."""
    _note_parameter(weight)
    return _wrap(weight._cell, weight._views, _outline(weight))


def _copied(weight: CodedWeight) -> CodedWeight:
    cell = weight._cell
    assert cell.form is not None
    make = coded_parameter if isinstance(weight, nn.Parameter) else coded
    twin: CodedWeight = make(cell.form, cell.dtype, cell.device)
    return twin


def _restored(form: WeightForm, dtype: torch.dtype, device: str) -> CodedWeight:
    return coded_parameter(form, dtype, torch.device(device))


def _wrap(cell: Cell, views: tuple[View, ...], outline: torch.Tensor) -> CodedWeight:
    with torch.inference_mode(False):  # for a later use outside of it
        weight: CodedWeight = torch.Tensor._make_wrapper_subclass(
            CodedWeight,
            outline.shape,
            strides=outline.stride(),
            storage_offset=outline.storage_offset(),
            dtype=outline.dtype,
            device=cell.device,
        )
    torch._C._set_throw_on_mutable_data_ptr(weight)
    weight._cell, weight._views, weight._read_copy = cell, views, None
    return weight


def _outline(weight: torch.Tensor) -> torch.Tensor:
    """Returns a tensor without memory that has the weight's shape, strides and dtype."""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


def _note_parameter(weight: CodedWeight) -> None:
    if isinstance(weight, nn.Parameter):
        weight._cell.is_parameter = True


def add_view(weight: CodedWeight, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Makes the object a view of what it was; the caller gives it the shape of that view."""
    _note_parameter(weight)
    func(_outline(weight), *args, **kwargs)  # an error of torch, before anything is changed
    weight._views = (*weight._views, Cut(func, args, kwargs, None))


def _views_of(weight: CodedWeight, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    _note_parameter(weight)
    outlines = func(_outline(weight), *args[1:], **kwargs)
    single = isinstance(outlines, torch.Tensor)
    made = [
        _wrap(
            weight._cell,
            (*weight._views, Cut(func, tuple(args[1:]), kwargs, None if single else number)),
            outline,
        )
        for number, outline in enumerate([outlines] if single else outlines)
    ]
    return made[0] if single else made


def _makes_views(func: Any) -> bool:
    """Whether an operator returns parts of its first argument's memory, without writing to it."""
    if func is torch.ops.aten._unsafe_view.default:  # its schema does not say so
        return True
    arguments = func._schema.arguments
    shares = arguments[0].alias_info if arguments else None
    return shares is not None and not shares.is_write


def _run_decoded(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator with plain tensors in place of coded ones.

    Those it writes to become dense.
    """
    written: dict[int, CodedWeight] = {}

    def target(value: Any) -> Any:
        if not isinstance(value, CodedWeight):
            return value
        dense = write(value, "was written to")
        written[id(dense)] = value
        return dense

    def source(value: Any) -> Any:
        return read(value) if isinstance(value, CodedWeight) else value

    writes = {
        argument.name: argument.alias_info is not None and argument.alias_info.is_write
        for argument in func._schema.arguments
    }
    plain_args = [
        tree_map(target if writes[argument.name] else source, value)
        for argument, value in zip(func._schema.arguments, args, strict=False)
    ]
    plain_kwargs = {
        name: tree_map(target if writes[name] else source, value) for name, value in kwargs.items()
    }
    result = func(*plain_args, **plain_kwargs)
    return tree_map(lambda value: written.get(id(value), value), result) if written else result


torch.serialization.add_safe_globals([_restored])
