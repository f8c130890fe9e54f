"""The kernels of the packed layout (`cuda/`): their sources for a setting, compiled at run time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader.kernels.nvrtc import Kernel, Launch

LEAST_SHARED = 96 << 10
"""Bytes of shared memory that a block may have on every device with the kernels, and more."""

UNPACK_THREADS = 256
"""Threads of a block of `packed_unpack` and `packed_gather`."""

_FOLDER = Path(__file__).parent / "cuda"


@cache
def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a block may have on a device."""
    if device.type != "cuda":
        return LEAST_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of a device."""
    return torch.cuda.get_device_capability(device)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels compile for a device: they need NVRTC and matrix units for bfloat16."""
    if device.type != "cuda" or capability(device) < (8, 0):
        return False
    try:
        kernel_of("packed_unpack", unpack_source(8, False), device)
    except UnsupportedEnvironmentError:
        return False
    return True


_compiling: dict[tuple[str, str, torch.device], threading.Lock] = {}


def kernel_of(name: str, source: str, device: torch.device) -> Kernel:
    """Returns a kernel of a source; a process compiles it once (0.3 s).

    Raises:
        UnsupportedEnvironmentError: it cannot be compiled here.
    """
    with _compiling.setdefault((name, source, device), threading.Lock()):
        return _compiled(name, source, device)


@cache
def _compiled(name: str, source: str, device: torch.device) -> Kernel:
    return Kernel(source, name, device)


class Launches:
    """Prepared launches of one matrix, each made once."""

    def __init__(self) -> None:
        """Has none yet."""
        self._made: dict[object, Launch] = {}

    def get(self, key: object, make: Callable[[], Launch]) -> Launch:
        """Returns the launch of a key; `make` prepares the first one."""
        launch = self._made.get(key)
        if launch is None:
            launch = self._made[key] = make()
        return launch


NULL = torch.empty(0)
"""Stands for a null pointer: a tensor without elements has the address 0."""


def optional(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Returns the tensors, and `NULL` for each that is None."""
    return [NULL if tensor is None else tensor for tensor in tensors]


@cache
def unpack_source(bits: int, is_half: bool) -> str:
    """Returns the source of `packed_unpack` and `packed_gather`.

    Args:
        bits: of the layout.
        is_half: whether they write float16, else bfloat16.
    """
    return source_of({"BITS": bits, "IS_HALF": int(is_half)}, "tile.cu", "unpack.cu")


@cache
def around_source(is_half: bool) -> str:
    """Returns the source of the kernels before and after a product."""
    return source_of({"BITS": 8, "IS_HALF": int(is_half)}, "tile.cu", "around.cu")


def prepare_launch(
    name: str,
    col_scale: torch.Tensor | None,
    inputs: torch.Tensor,
    sizes: tuple[int, int, int],
    blocks: int,
) -> Launch:
    """Returns a launch of `prepare_inputs` or `prepare_groups`, without its addresses.

    Args:
        name: of the kernel.
        col_scale: scales of the columns, or None.
        inputs: tensor of the dtype and device of the inputs.
        sizes: inputs, columns, and tiles of 8 inputs.
        blocks: blocks of 256 threads.
    """
    source = around_source(inputs.dtype == torch.float16)
    arguments: list[torch.Tensor | int] = [NULL, *optional(col_scale), NULL, NULL, *sizes]
    return kernel_of(name, source, inputs.device).prepare((blocks, 1), 256, 0, arguments)


@cache
def packing_source(bits: int, source_bytes: int) -> str:
    """Returns the source of the kernels that pack.

    Args:
        bits: of the layout.
        source_bytes: bytes of an element of the matrix that is packed: 1 or 2.
    """
    return source_of({"BITS": bits, "SOURCE_BYTES": source_bytes}, "pack.cu")


def source_of(macros: dict[str, int], *files: str, between: str = "") -> str:
    """Returns a source: macros, types, then files; `between` comes before the last of them."""
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    texts = [(_FOLDER / file).read_text(encoding="utf-8") for file in ("types.cu", *files)]
    return "\n".join([*lines, *texts[:-1], between, texts[-1]])
