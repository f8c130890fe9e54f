"""Compiles CUDA C at run time with NVRTC and launches it through the driver, both by ctypes.

NVRTC comes with torch for CUDA. Only public C API of CUDA 12 and 13 is called. Callers have another
way where a library is missing or fails.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError

_SUCCESS = 0
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class Kernel:
    """A compiled function on one device."""

    def __init__(self, source: str, name: str, device: torch.device) -> None:
        """Compiles `source` for the device and loads the function `name`.

        Raises:
            UnsupportedEnvironmentError: there is no NVRTC or it cannot compile this.
        """
        self._driver = _driver()
        image = _compile(source, torch.cuda.get_device_capability(device))
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # makes the device's context current
            _check_driver(self._driver.cuModuleLoadData(ctypes.byref(module), image))
            _check_driver(
                self._driver.cuModuleGetFunction(
                    ctypes.byref(self._function), module, name.encode()
                )
            )
        self._device, self._shared = device, 0

    def launch(
        self, blocks: int, threads: int, shared: int, arguments: Sequence[torch.Tensor | int]
    ) -> None:
        """Queues the function on the device's current stream; nothing is synchronized.

        Args:
            blocks: number of blocks.
            threads: threads of each.
            shared: bytes of dynamic shared memory of each.
            arguments: tensors give their addresses, integers are 32-bit.
        """
        values = [_c_value(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
            self._own_context()
            self._allow(shared)
            _check_driver(
                self._driver.cuLaunchKernel(
                    self._function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None
                )
            )

    def prepare(
        self,
        blocks: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Sequence[torch.Tensor | int],
        overlaps: bool = False,
    ) -> Launch:
        """Returns a launch whose arguments are converted once; see `launch` for them.

        Args:
            blocks: numbers of blocks in two dimensions.
            threads: as for `launch`.
            shared: as for `launch`.
            arguments: as for `launch`.
            overlaps: whether it may begin while the kernel ahead of it in the stream still runs;
                it waits for that one itself. Needs compute capability 9.0.
        """
        self._allow(shared)
        sizes = (*blocks, 1, threads, 1, 1, shared)
        if not overlaps:
            return Launch(self._driver, self._function, sizes, arguments)
        return OverlappingLaunch(self._driver, self._function, sizes, arguments)

    def _allow(self, shared: int) -> None:
        """Lets a block have this dynamic shared memory: unasked it has 48 KiB of both kinds."""
        if shared > self._shared:
            most = _MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check_driver(self._driver.cuFuncSetAttribute(self._function, most, shared))
            self._shared = shared

    def _own_context(self) -> None:
        """Makes the context of the device current in a thread that has none."""
        context = ctypes.c_void_p()
        _check_driver(self._driver.cuCtxGetCurrent(ctypes.byref(context)))
        if not context.value:
            torch.cuda.synchronize(self._device)


class Launch:
    """A kernel with arguments in C's form: a further launch costs a few microseconds of host time.

    `run` may be called by several threads: the lock keeps the arguments of one call together.
    """

    def __init__(
        self,
        driver: ctypes.CDLL,
        function: ctypes.c_void_p,
        sizes: tuple[int, ...],
        arguments: Sequence[torch.Tensor | int],
    ) -> None:
        """Converts the arguments; tensors become pointers. The caller keeps the tensors alive.

        Args:
            driver: CUDA's driver.
            function: the kernel.
            sizes: three numbers of blocks, three of threads, and bytes of dynamic shared memory.
            arguments: see `Kernel.launch`.
        """
        self._values = [_c_value(value) for value in arguments]
        addresses = (ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in self._values)
        self._pointers = (ctypes.c_void_p * len(self._values))(*addresses)
        self._driver, self._function, self._sizes = driver, function, sizes
        self._lock = threading.Lock()

    def run(self, stream: int, changes: Sequence[tuple[int, int]]) -> None:
        """Queues the kernel on a stream of the current device.

        Args:
            stream: the stream's handle.
            changes: index of an argument, and its new address or 32-bit number.
        """
        values = self._values
        with self._lock:
            for index, value in changes:
                values[index].value = value
            status = self._queue(stream)
        if status != _SUCCESS:
            _check_driver(status)

    def _queue(self, stream: int) -> int:
        function, sizes, pointers = self._function, self._sizes, self._pointers
        handle = ctypes.c_void_p(stream)
        status: int = self._driver.cuLaunchKernel(function, *sizes, handle, pointers, None)
        return status


class OverlappingLaunch(Launch):
    """A launch that begins while the kernel ahead of it ends; the kernel waits for it itself."""

    def __init__(self, *arguments: Any) -> None:
        """See `Launch`."""
        super().__init__(*arguments)
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self._config = _Config(*self._sizes, None, ctypes.pointer(self._attribute), 1)

    def _queue(self, stream: int) -> int:
        config = self._config
        config.stream = stream
        status: int = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), self._function, self._pointers, None
        )
        return status


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: a kind, 4 bytes of padding, a union of 64 bytes."""

    _fields_ = (("kind", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((f"size{number}", ctypes.c_uint) for number in range(7)),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def _c_value(value: torch.Tensor | int) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value)


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise UnsupportedEnvironmentError(f"CUDA's driver cannot be loaded: {exc}") from exc


@cache
def _nvrtc() -> ctypes.CDLL:
    """Loads the library of torch's CUDA version, from torch's packages or from the system."""
    if torch.version.cuda is None:
        raise UnsupportedEnvironmentError("NVRTC needs a torch built for CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    for place in (
        name,
        *_packaged(name),
    ):  # a library that torch has loaded is found by its name alone
        try:
            library = ctypes.CDLL(place)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise UnsupportedEnvironmentError(
        f"{name} was not found; it comes with torch for CUDA as nvidia-cuda-nvrtc"
    )


def _packaged(name: str) -> list[str]:
    spec = find_spec("nvidia")
    folders = (
        spec.submodule_search_locations
        if spec is not None and spec.submodule_search_locations
        else []
    )
    return [str(path) for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{name}"))]


def architecture(capability: tuple[int, int]) -> str:
    """Returns the name of a target with all instructions of a compute capability.

    Examples:
        >>> architecture((8, 6)), architecture((9, 0))
        ('sm_86', 'sm_90a')
    """
    name = f"sm_{capability[0]}{capability[1]}"
    return f"{name}a" if capability == (9, 0) else name


def _compile(source: str, capability: tuple[int, int]) -> bytes:
    """Returns machine code for a compute capability."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"codecllm.cu", 0, None, None
        ),
    )
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture(capability)}".encode())
        if nvrtc.nvrtcCompileProgram(program, 1, options) != _SUCCESS:
            raise UnsupportedEnvironmentError(
                f"NVRTC cannot compile for {architecture(capability)}: {_log(program)}"
            )
        size = ctypes.c_size_t()
        _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _log(program: ctypes.c_void_p) -> str:
    nvrtc, size = _nvrtc(), ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(max(1, size.value))
    nvrtc.nvrtcGetProgramLog(program, text)
    return " ".join(text.value.decode(errors="replace").split())[:500]


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != _SUCCESS:
        raise UnsupportedEnvironmentError(
            f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status).decode()}"
        )


def _check_driver(status: int) -> None:
    if status != _SUCCESS:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(words))
        raise UnsupportedEnvironmentError(
            f"CUDA's driver failed: {(words.value or b'unknown error').decode()} ({status})"
        )
