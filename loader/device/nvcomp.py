"""Zstandard frames through nvCOMP's batched C API, version 6, by ctypes.

Its Python package inserts stream synchronizations and copies to the host;
`nvcompBatchedZstdDecompressAsync` only queues work. The declarations below follow `nvcomp/zstd.h`
and `nvcomp/shared_types.h` of 6.0; another major version is refused, for options are passed by
value and would be read wrongly. The library's decoder is undefined on invalid frames: give it only
chunks whose checksum was compared and whose frame header was checked.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.errors import DecodeError, UnsupportedEnvironmentError

SUPPORTED_MAJOR = 6
LIBRARY = "libnvcomp.so.6"
MIN_CAPABILITY = (7, 0)
"""Oldest GPUs that this version is built for: Volta."""

SUCCESS = 0
_ALIGNED_BYTES = 16
"""Alignment that the callers keep: slots of payloads begin at multiples of 16."""


class DecompressOptions(ctypes.Structure):
    """`nvcompBatchedZstdDecompressOpts_t`: 64 bytes, passed by value; zeros are the defaults."""

    _fields_ = (("backend", ctypes.c_int), ("reserved", ctypes.c_char * 60))


class Alignments(ctypes.Structure):
    """`nvcompAlignmentRequirements_t`."""

    _fields_ = (("input", ctypes.c_size_t), ("output", ctypes.c_size_t), ("temp", ctypes.c_size_t))


class Properties(ctypes.Structure):
    """`nvcompProperties_t`.

    The version is major * 1000 + minor * 100 + patch, CUDA's is major * 1000 + minor * 10.
    """

    _fields_ = (("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32))


_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "nvcompGetProperties": (ctypes.POINTER(Properties),),
    "nvcompBatchedZstdDecompressGetRequiredAlignments": (
        DecompressOptions,
        ctypes.POINTER(Alignments),
    ),
    "nvcompBatchedZstdDecompressGetTempSize": (
        _SIZE,
        _SIZE,
        DecompressOptions,
        ctypes.POINTER(_SIZE),
        _SIZE,
        _POINTER,
    ),
    "nvcompBatchedZstdDecompressAsync": (
        _POINTER,  # device_compressed_chunk_ptrs
        _POINTER,  # device_compressed_chunk_bytes
        _POINTER,  # device_uncompressed_buffer_bytes
        _POINTER,  # device_uncompressed_chunk_bytes, receives the decoded sizes
        _SIZE,  # num_chunks
        _POINTER,  # device_temp_ptr
        _SIZE,  # temp_bytes
        _POINTER,  # device_uncompressed_chunk_ptrs
        DecompressOptions,
        _POINTER,  # device_statuses
        _POINTER,  # stream
    ),
}


@dataclass(frozen=True, slots=True)
class ZstdFrames:
    """A batch of frames. The four arrays lie one behind another on the device, int64 [count] each.

    Attributes:
        sources: address of the addresses of the frames.
        sizes: address of their stored sizes.
        raw_sizes: address of their decoded sizes.
        targets: address of the addresses where their symbols go.
        count: how many.
        largest: most symbols of one.
        symbols: symbols of all.
    """

    sources: int
    sizes: int
    raw_sizes: int
    targets: int
    count: int
    largest: int
    symbols: int


class Nvcomp:
    """The library, loaded and checked.

    Attributes:
        version: of the library, like 6.0.0.
        cuda: version of CUDA that it was built with, like 13.0.
    """

    def __init__(self, path: Path) -> None:
        """Loads the library and checks that it is the one declared here.

        Raises:
            UnsupportedEnvironmentError: it cannot be loaded, is of another version, or asks for
                more than it is given.
        """
        try:
            self._library = ctypes.CDLL(str(path))
            for name, arguments in _PROTOTYPES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = ctypes.c_int, arguments
            self._library.nvcompGetStatusString.restype = ctypes.c_char_p
            self._library.nvcompGetStatusString.argtypes = (ctypes.c_int,)
        except (OSError, AttributeError) as exc:
            raise UnsupportedEnvironmentError(
                f"nvCOMP cannot be loaded: {exc}", file=path.name
            ) from exc
        properties = Properties()
        self._call("nvcompGetProperties", ctypes.byref(properties))
        major, rest = divmod(properties.version, 1000)
        self.version = f"{major}.{rest // 100}.{rest % 100}"
        self.cuda = f"{properties.cudart_version // 1000}.{properties.cudart_version % 1000 // 10}"
        if major != SUPPORTED_MAJOR:
            raise UnsupportedEnvironmentError(
                "nvCOMP has another version", got=self.version, expected=f"{SUPPORTED_MAJOR}.x"
            )
        alignments = Alignments()
        self._call(
            "nvcompBatchedZstdDecompressGetRequiredAlignments",
            DecompressOptions(),
            ctypes.byref(alignments),
        )
        if (
            alignments.input > _ALIGNED_BYTES
            or alignments.output > 1
            or alignments.temp > _ALIGNED_BYTES
        ):
            got = f"{alignments.input}, {alignments.output}, {alignments.temp} bytes"
            raise UnsupportedEnvironmentError(
                "nvCOMP asks for stricter alignment", got=got, expected="16, 1, 16 bytes at most"
            )

    def temp_bytes(self, count: int, largest: int, symbols: int) -> int:
        """Returns the scratch bytes of a batch, about three times its symbols.

        It has `count` chunks of at most `largest` bytes.
        """
        size = ctypes.c_size_t()
        self._call(
            "nvcompBatchedZstdDecompressGetTempSize",
            count, largest, DecompressOptions(), ctypes.byref(size), symbols, None,
        )  # fmt: skip
        return size.value

    def decode(
        self, frames: ZstdFrames, temp: torch.Tensor, sizes: int, statuses: int, stream: int
    ) -> None:
        """Queues the decoding of a batch on `stream`; nothing is synchronized.

        Args:
            frames: the batch, see there.
            temp: uint8 [n] on the device, of `temp_bytes` or more.
            sizes: address of int64 [count] on the device; receives the decoded sizes.
            statuses: address of int32 [count] on the device; receives `SUCCESS` or a status for
                `explain`.
            stream: handle of the stream.

        Raises:
            DecodeError: the work could not be queued.
        """
        self._call(
            "nvcompBatchedZstdDecompressAsync",
            frames.sources, frames.sizes, frames.raw_sizes, sizes, frames.count,
            temp.data_ptr(), temp.numel(),
            frames.targets, DecompressOptions(), statuses, stream,
        )  # fmt: skip

    def explain(self, status: int) -> str:
        """Returns the library's words for a status."""
        words: bytes | None = self._library.nvcompGetStatusString(status)
        return f"nvCOMP status {status}: {words.decode() if words else 'unknown'}"

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != SUCCESS:
            raise DecodeError(f"{name} failed: {self.explain(status)}")


def open_nvcomp(device: torch.device) -> Nvcomp:
    """Finds and loads the library for a device.

    Raises:
        UnsupportedEnvironmentError: it is not installed, was built for a newer CUDA than torch, or
            does not know this GPU.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        raise UnsupportedEnvironmentError(
            "nvCOMP needs an NVIDIA GPU and a torch built for CUDA", got=str(device)
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        got = ".".join(map(str, capability))
        raise UnsupportedEnvironmentError(
            "nvCOMP does not know this GPU", got=f"compute capability {got}", expected="7.0 or more"
        )
    library = Nvcomp(find_library())
    if int(library.cuda.split(".")[0]) > int(torch.version.cuda.split(".")[0]):
        raise UnsupportedEnvironmentError(
            "nvCOMP was built for a newer CUDA than torch",
            got=library.cuda,
            expected=f"{torch.version.cuda} or older",
        )
    return library


def find_library() -> Path:
    """Returns the path of the library in the package nvidia-libnvcomp-cu12 or -cu13.

    Raises:
        UnsupportedEnvironmentError: neither is installed, or it is another version.
    """
    try:
        spec = find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        major = (torch.version.cuda or "13").split(".")[0]
        raise UnsupportedEnvironmentError(
            f"nvCOMP is not installed: pip install 'codecllm[cu{major}]'"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / "lib64" / LIBRARY
    if not path.is_file():
        names = sorted(file.name for file in folder.glob("lib*/libnvcomp.so*"))
        raise UnsupportedEnvironmentError(
            "nvCOMP has another version", got=", ".join(names) or "no library", expected=LIBRARY
        )
    return path
