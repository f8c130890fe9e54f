"""The memory that a coded weight shares with its aliases and views, and how views are cut of it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from codecllm.loader.resident.form import WeightForm

View = Callable[[torch.Tensor], torch.Tensor]


class _Becoming:
    """One lock for all cells: few weights become dense.

    A forked child gets a new one: the thread that held the old one is not there.
    """

    lock: ClassVar[threading.RLock] = threading.RLock()

    @classmethod
    def renew(cls) -> None:
        cls.lock = threading.RLock()


os.register_at_fork(after_in_child=_Becoming.renew)


class Cell:
    """The memory that a weight and its aliases share.

    It is a form, or the plain tensor that took its place.

    Attributes:
        form: the form, or None.
        dense: the plain tensor, or None.
        dtype: dtype of the whole weight.
        device: its device.
        is_parameter: whether a parameter uses it, so that becoming dense is worth a line.
    """

    def __init__(self, form: WeightForm | None, dtype: torch.dtype, device: torch.device) -> None:
        """Begins with a form; None: with no memory, until `dense` is set."""
        self.form = form
        self.dense: torch.Tensor | None = None
        self.dtype, self.device = dtype, device
        self.is_parameter = False
        self._copy: weakref.ref[torch.Tensor] | None = None

    def read(self) -> torch.Tensor:
        """Returns the values, [rows, cols]: decoded into new memory, or the plain tensor."""
        form, dense = self.form, self.dense  # in this order: another thread may write meanwhile
        if dense is None:
            assert form is not None
            dense = form.dense(self.dtype, self.device)
        return dense

    def shared_copy(self) -> torch.Tensor:
        """Returns the values as a plain tensor, the same one as long as a caller holds it."""
        if self.dense is not None:
            return self.dense
        copy = self._copy() if self._copy is not None else None
        if copy is None:
            with torch.inference_mode(False), torch.no_grad():
                copy = self.read()
            self._copy = weakref.ref(copy)
        return copy

    def become_dense(self) -> torch.Tensor:
        """Puts a plain tensor in the place of the form; returns it."""
        with _Becoming.lock:  # a second writer would drop what the first one wrote
            if self.dense is None:
                with torch.inference_mode(False), torch.no_grad():
                    self.dense = self.read()
                self.form = None
            return self.dense

    def take(self, other: Cell) -> None:
        """Takes over the values of another cell of the same dtype."""
        assert other.form is not None
        self.form, self.dense, self._copy = other.form.moved(self.device), None, None


def has_history(tensor: torch.Tensor) -> bool:
    """Whether gradients flow through it to other tensors, or its own were seen or are watched.

    A view counts: a later write to it has to reach the tensor that it is a view of.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if tensor._is_view() or not tensor.is_leaf:
            return True
        hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
        return bool(hooks) or tensor.grad is not None


def cut(values: torch.Tensor, views: tuple[View, ...]) -> torch.Tensor:
    """Returns the part of a whole weight's values that views take one after the other."""
    for view in views:
        values = view(values)
    return values


@dataclass(frozen=True, slots=True)
class Cut:
    """One view: the operator that makes it, and the index of its result.

    The index is None where the operator has one result.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int | None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the part of the values."""
        made = self.func(values, *self.args, **self.kwargs)
        part: torch.Tensor = made if self.number is None else made[self.number]
        return part


def selected(view: View) -> int | None:
    """Returns the number of the matrix that a view of a stack selects, or None."""
    if not isinstance(view, Cut) or view.func is not torch.ops.aten.select.int:
        return None
    dim, number = view.args
    return int(number) if dim == 0 else None
