"""Small tensors that one job decodes, and that one message takes.

A hand-over between threads costs as much as decoding some of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from codecllm.loader.engine import Request
from codecllm.loader.promise import Promise

Outcomes = Mapping[Request, torch.Tensor | BaseException]
"""The tensor of each request, or its error."""


class Together:
    """Small tensors that were begun together.

    They are kept until the last of them is taken. Callers take no lock here: each step on a set or
    a promise is one step for the interpreter, and doing one twice changes nothing.

    Attributes:
        requests: the tensors.
        size: bytes that they take in memory.
    """

    def __init__(self, requests: list[Request], size: int) -> None:
        self.requests = requests
        self.size = size
        self._outcomes: Promise[Outcomes] = Promise()
        self._untaken = set(requests)
        self._waiting: list[tuple[Request, Promise[torch.Tensor]]] = []

    @property
    def done(self) -> bool:
        """Whether all of them are complete, or failed."""
        return self._outcomes.done

    def give(self, outcomes: Outcomes) -> None:
        """Sets the tensor, or the error, of each request."""
        self._outcomes.give(outcomes)
        self._settle()

    def fail(self, error: BaseException) -> None:
        """Sets one error for all of them, unless they are complete."""
        self._outcomes.fail(error)
        self._settle()

    def take(self, request: Request) -> TensorOfBlock:
        """Returns what becomes of a tensor, which counts as taken from now on."""
        self._untaken.discard(request)
        return TensorOfBlock(self._outcomes, request)

    def take_as(self, request: Request, promise: Promise[torch.Tensor]) -> None:
        """Takes a tensor for a caller that waits for `promise` already."""
        self._untaken.discard(request)
        self._waiting.append((request, promise))
        # Checked behind: the block may have been completed before the promise could be seen.
        if self.done:
            self._settle()

    def drop(self, request: Request) -> None:
        """Counts a tensor as taken that no caller will take."""
        self._untaken.discard(request)

    @property
    def is_taken(self) -> bool:
        """Whether the last of them was taken."""
        return not self._untaken

    def _settle(self) -> None:
        for request, promise in self._waiting.copy():
            error = TensorOfBlock(self._outcomes, request).error()
            if error is not None:
                promise.fail(error)
            else:
                promise.give(TensorOfBlock(self._outcomes, request).get())


class TensorOfBlock:
    """One of some tensors that are given together; see `promise.Awaited`."""

    __slots__ = ("_outcomes", "_request")

    def __init__(self, outcomes: Promise[Outcomes], request: Request) -> None:
        self._outcomes = outcomes
        self._request = request

    def error(self) -> BaseException | None:
        """Waits; returns the error of the tensor, or None where there is none."""
        error = self._outcomes.error()
        if error is not None:
            return error
        outcome = self._outcomes.get()[self._request]
        return outcome if isinstance(outcome, BaseException) else None

    def get(self) -> torch.Tensor:
        """Waits for the tensor and returns it, or raises its error. May be called again."""
        outcome = self._outcomes.get()[self._request]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
