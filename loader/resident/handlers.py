"""Functions and operators of torch that a coded weight answers itself.

`operations.py` fills both tables. They stand here so that the weight and its operations do not
import each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Handler = Callable[..., Any]

ABOVE_AUTOGRAD: dict[Any, Handler] = {}
"""Function of torch -> handler, before autograd."""

BELOW_AUTOGRAD: dict[Any, Handler] = {}
"""Operator -> handler; a handler that returns NotImplemented leaves it to decoded values."""
