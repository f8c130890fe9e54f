"""The contract of a weight that is not stored as its dtype.

Its product is one operation for autograd and for the compiler.

`CodedWeight` is the tensor that a model sees; a `WeightForm` is how its values lie in memory. A new
residency is one subclass: it says how to decode, how to multiply, and how to travel (devices,
copies, other processes). All else (reads, writes, views, training, saving) follows from
`CodedWeight`.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from codecllm.formats.errors import UsageError

_numbers = itertools.count(secrets.randbits(62))
"""Numbers of forms. No other process has them: code that is saved with one, and loaded elsewhere,
finds no weight, where small numbers would find one of another model."""
_forms: weakref.WeakValueDictionary[int, WeightForm] = weakref.WeakValueDictionary()


class WeightForm(ABC):
    """The values of a weight in a form from which any float dtype is decoded.

    A weight is a matrix [rows, cols], or a stack of matrices [n, rows, cols].

    A form never changes: copies of a model share it, and a weight that is written to gives it up.
    Its values follow from SPEC.md alone: `dense`, `gather` and `product` use the bits that dense
    loading puts into memory. `product` may round in another order where the class says so.

    Attributes:
        kind: name of the residency, for messages.
        name: the container's name of the tensor, for messages.
        shape: shape of the weight.
    """

    kind: ClassVar[str]
    name: str
    shape: torch.Size

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory that the form takes."""

    @abstractmethod
    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the weight, `dtype` [rows, cols] on `device`, in memory of its own.

        Raises:
            FormatError: the form was damaged in memory.
        """

    @abstractmethod
    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns rows of the weight.

        Args:
            rows: int64 or int32 [n], on any device.
            dtype: float dtype of the result.
            device: its device.

        Returns:
            `dtype` [n, cols].

        Raises:
            IndexError: a row lies outside of the weight.
        """

    @abstractmethod
    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns `inputs @ weight.T + bias` without gradients.

        Args:
            inputs: float [..., cols]; the weight is decoded to their dtype.
            bias: [rows] of the same dtype, or None.

        Returns:
            [..., rows], dtype and device of `inputs`.
        """

    @abstractmethod
    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns `grad @ weight`, float [..., cols] of the dtype of `grad` [..., rows].

        This is the gradient of the inputs.
        """

    def member(self, number: int) -> WeightForm | None:
        """Returns the form of matrix `number` of a stack of matrices; None where it is no stack."""
        return None

    @abstractmethod
    def moved(self, device: torch.device) -> WeightForm:
        """Returns the form for a weight on `device`; itself where its memory stays."""

    @abstractmethod
    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that hold the form, by a name; two processes can share them."""

    def parts(self) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
        """Returns tensors that a compiler may follow, and plain facts.

        `from_parts` makes the form again from both.

        By default the compiler sees nothing: the facts are a number that finds this form, and
        products are one opaque operation each.
        """
        anchor = _anchors.get(self)
        if anchor is None:
            # With memory, by which tools tell weights apart: tied ones share a form.
            anchor = _anchors[self] = torch.empty(1, dtype=torch.uint8, device="cpu")
        return {"anchor": anchor}, (number_of(self),)

    @classmethod
    def from_parts(cls, tensors: dict[str, torch.Tensor], facts: tuple[Any, ...]) -> WeightForm:
        """Returns the form of `parts`, or one like it with other tensors."""
        return _Numbered(facts[0], tensors)

    @property
    def in_compiler(self) -> bool:
        """Whether a compiler follows the calls, so that there is no memory to be read."""
        return any(is_traced(tensor) for tensor in self.held_tensors().values())

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes `product` with gradients for `inputs` and `bias`.

        The weight is decoded anew for them, not kept.
        """
        if torch.is_grad_enabled() and (
            inputs.requires_grad or (bias is not None and bias.requires_grad)
        ):
            result: torch.Tensor = _FrozenProduct.apply(inputs, self, bias)
            return result
        return self.product(inputs, bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: it never changes."""
        return self


class _FrozenProduct(torch.autograd.Function):
    """The product with a form, with gradients for inputs and bias."""

    @staticmethod
    def forward(inputs: torch.Tensor, form: WeightForm, bias: torch.Tensor | None) -> torch.Tensor:
        return form.product(inputs, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.form = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_inputs = ctx.form.transposed_product(grad) if ctx.needs_input_grad[0] else None
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return to_inputs, None, to_bias


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a compiler's.

    It has no memory, and no choice can be made by its address.
    """
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def refuse_graphs(form: WeightForm) -> None:
    """Refuses graphs that may leave this process.

    There a form is found by a number, or a kernel was chosen for the inputs of the trace.

    Raises:
        UsageError: `torch.export`, `torch.jit.trace` or `make_fx` runs; the latter is in
            `torch.func.linearize`, too, and keeps memory into which other weights are decoded.
    """
    is_kept = form.kind != "int8" and get_proxy_mode() is not None and not form.in_compiler
    is_left = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if is_kept or is_left:
        raise UsageError(
            "a graph cannot hold weights that stay coded: call model.dequantize() before "
            "torch.export, torch.jit.trace or torch.func.linearize",
            tensor=form.name or None,
        )


def number_of(form: WeightForm) -> int:
    """Returns the number by which compiled code finds a form of this process."""
    if isinstance(form, _Numbered):
        return form.number
    number = _numbers_of.get(form)
    if number is None:
        number = _numbers_of[form] = next(_numbers)
        _forms[number] = form
    return number


_anchors: weakref.WeakKeyDictionary[WeightForm, torch.Tensor] = weakref.WeakKeyDictionary()
_numbers_of: weakref.WeakKeyDictionary[WeightForm, int] = weakref.WeakKeyDictionary()


def _numbered(number: int) -> WeightForm:
    form = _forms.get(number)
    if form is None:
        raise UsageError(
            "compiled code refers to a weight that no model has any more; compile again"
        )
    return form


class _Numbered(WeightForm):
    """A form inside of a compiler.

    Every use is one operation that finds the real form by its number.
    """

    kind = "compressed"

    def __init__(self, number: int, anchor: dict[str, torch.Tensor]) -> None:
        self.number, self._anchor = number, anchor
        form = _numbered(number)
        self.name, self.shape = form.name, form.shape

    @property
    def nbytes(self) -> int:
        return _numbered(self.number).nbytes

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        decoded: torch.Tensor = _dense_operation(self.number, dtype, device)
        return decoded

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        gathered: torch.Tensor = _gather_operation(rows, self.number, dtype, device)
        return gathered

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = _product_operation(inputs, bias, self.number)
        return result

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _transposed_operation(grad, self.number)
        return result

    def moved(self, device: torch.device) -> WeightForm:
        return self

    def held_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def parts(self) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
        return self._anchor, (self.number,)

    @property
    def in_compiler(self) -> bool:
        return True


def _empty(number: int, like: torch.Tensor, axis: int) -> torch.Tensor:
    return like.new_empty(*like.shape[:-1], _numbered(number).shape[axis])


_dense_operation = torch.library.custom_op(
    "codecllm::coded_dense",
    lambda number, dtype, device: _numbered(number).dense(dtype, device),
    mutates_args=(),
    schema="(int number, ScalarType dtype, Device device) -> Tensor",
)
_dense_operation.register_fake(
    lambda number, dtype, device: torch.empty(_numbered(number).shape, dtype=dtype, device=device)
)

_gather_operation = torch.library.custom_op(
    "codecllm::coded_gather",
    lambda rows, number, dtype, device: _numbered(number).gather(rows, dtype, device),
    mutates_args=(),
    schema="(Tensor rows, int number, ScalarType dtype, Device device) -> Tensor",
)
_gather_operation.register_fake(
    lambda rows, number, dtype, device: torch.empty(
        rows.shape[0], _numbered(number).shape[1], dtype=dtype, device=device
    )
)

_product_operation = torch.library.custom_op(
    "codecllm::coded_linear",
    lambda inputs, bias, number: _numbered(number).product(inputs, bias),
    mutates_args=(),
    schema="(Tensor inputs, Tensor? bias, int number) -> Tensor",
)
_product_operation.register_fake(lambda inputs, bias, number: _empty(number, inputs, 0))

_transposed_operation = torch.library.custom_op(
    "codecllm::coded_linear_of_gradient",
    lambda grad, number: _numbered(number).transposed_product(grad),
    mutates_args=(),
    schema="(Tensor grad, int number) -> Tensor",
)
_transposed_operation.register_fake(lambda grad, number: _empty(number, grad, 1))
