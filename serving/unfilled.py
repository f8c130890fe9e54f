"""Finds parameters, and parts of fused ones, that a load left without weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from codecllm.formats.errors import ModelMismatchError

_PATTERNS = {
    torch.bfloat16: (torch.int16, 0x7FA5),
    torch.float16: (torch.int16, 0x7DA5),
    torch.float32: (torch.int32, 0x7FA5C0DE),
}
"""Bits that no weight has: signalling NaNs."""

COUNTED = "codecllm_counted"
"""Attribute, True, of parameters whose layer counts its parts itself."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A parameter that was marked, and the elements that the mark took the place of."""

    parameter: torch.nn.Parameter
    before: torch.Tensor


def mark_unfilled(model: torch.nn.Module) -> dict[str, Mark]:
    """Writes a pattern to the first element of every row of every parameter.

    A fused parameter is filled by whole rows, so one element a row shows which rows came.
    """
    marks = {}
    for name, parameter in model.named_parameters():
        is_counted = parameter.is_meta or getattr(parameter, COUNTED, False)
        if parameter.dtype in _PATTERNS and parameter.numel() and not is_counted:
            words, pattern = _first_words(parameter)
            marks[name] = Mark(parameter, words.clone())
            words.fill_(pattern)
    return marks


def refuse_unfilled(model: torch.nn.Module, marks: dict[str, Mark]) -> list[str]:
    """Raises an error where a part of a parameter still has the pattern.

    A parameter of which nothing came gets its values back: an engine may know that it has
    defaults.

    Args:
        model: the model.
        marks: of `mark_unfilled`. Parameters that were replaced since are not looked at.

    Returns:
        The names of parameters of which nothing came.

    Raises:
        ModelMismatchError: some rows of a parameter got weights and others did not.
    """
    untouched = []
    for name, parameter in model.named_parameters():
        mark = marks.get(name)
        if mark is None or mark.parameter is not parameter:
            continue
        words, pattern = _first_words(parameter)
        missing = int((words == pattern).sum())
        if missing == words.numel():
            words.copy_(mark.before)
            untouched.append(name)
        elif missing:
            raise ModelMismatchError(
                "a part of the parameter got no weights from the container",
                tensor=name,
                got=f"{words.numel() - missing} rows",
                expected=words.numel(),
            )
    return untouched


def _first_words(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """Returns the first element of every row as integers, in the parameter's memory."""
    dtype, pattern = _PATTERNS[parameter.dtype]
    data = parameter.data
    first = data[..., 0] if data.ndim > 1 else data
    return first.view(dtype), pattern
