"""The native core `codecllm._native`, where it was built; numpy gives the same bits without it.

The environment variable `CODECLLM_NATIVE` is `0` to do without it, or the name of the kernels to
use (`avx512`, `avx2`, `portable`) instead of the best that the machine can run. It is read once, at
the first import.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

from codecllm.formats.errors import UsageError, shown

_SETTING = os.environ.get("CODECLLM_NATIVE", "")
_INTERFACE = 3
"""Of the core's functions; native/module.c has the same number."""
HOW_TO_GET = (
    "install a wheel of codecllm for this platform, or install from source where a C compiler is"
)


def _load() -> ModuleType | None:
    if _SETTING == "0":
        return None
    try:
        from codecllm import _native
    except ImportError:
        # A platform without a wheel: numpy gives the same bits.
        return None
    if not _is_current(_native):
        warnings.warn(
            "codecllm._native was built from other sources than this codecllm, and numpy does its "
            "work, slower: run setup.py build_ext --inplace",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if _SETTING:
        try:
            _native.use(_SETTING)
        except ValueError as exc:
            raise UsageError(
                "CODECLLM_NATIVE names no kernels that this machine can run",
                got=shown(_SETTING),
                expected=", ".join(("0", *_native.kernels())),
            ) from exc
    return _native


def _is_current(module: ModuleType) -> bool:
    """Whether a built core has the functions that these sources call."""
    interface = getattr(module, "interface", None)
    if interface is None:
        return False
    return bool(interface() == _INTERFACE)


core = _load()
"""The module, or None. Its functions release the interpreter's lock while they work."""


def describe() -> str:
    """Returns which kernels are in use, or why there are none."""
    if core is not None:
        return f"{core.in_use()} kernels"
    if _SETTING == "0":
        return "turned off by CODECLLM_NATIVE=0"
    return f"not built: numpy does its work, slower; {HOW_TO_GET}"
