"""The native core `codecllm._native`, where it was built; numpy gives the same bits without it.

The environment variable `CODECLLM_NATIVE` is `0` to do without it, or the name of the kernels to
use (`avx512`, `avx2`, `portable`) instead of the best that the machine can run. It is read once, at
the first import.
"""

from __future__ import annotations

import os
from types import ModuleType

_SETTING = os.environ.get("CODECLLM_NATIVE", "")
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
    if _SETTING:
        _native.use(_SETTING)
    return _native


core = _load()
"""The module, or None. Its functions release the interpreter's lock while they work."""


def describe() -> str:
    """Returns which kernels are in use, or why there are none."""
    if core is not None:
        return f"{core.in_use()} kernels"
    if _SETTING == "0":
        return "turned off by CODECLLM_NATIVE=0"
    return f"not built: numpy does its work, slower; {HOW_TO_GET}"
