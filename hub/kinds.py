"""Kinds of files of a model repository, by their names: weights, pickles, code and others."""

from __future__ import annotations

import re
from typing import Literal

INDEX_BYTES = 64 << 20
"""Most bytes of an index, or of another JSON file that says which files a source has."""

MOST_MODULES = 256
"""Most folders of modules of a repository: every one is looked for."""

FileKind = Literal[
    "safetensors", "index", "pickle", "weights", "archive", "code", "hidden", "other"
]
"""Kinds of files.

`weights`: of formats other than safetensors and pickles. `index`: says in which files weights are.
`other`: may be copied.
"""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_SUFFIXES: dict[FileKind, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "pickle": PICKLE_SUFFIXES,
    "weights": (
        *(".gguf", ".ggml", ".onnx", ".onnx_data", ".onnx.data", ".h5", ".hdf5", ".keras"),
        *(".msgpack", ".tflite", ".pb", ".engine", ".plan", ".trt", ".mlmodel", ".nemo", ".ot"),
        *(".llamafile", ".pte", ".dduf", ".ort", ".distcp", ".pdparams", ".pdiparams", ".mar"),
        *(".weights", ".mnn", ".npu", ".espresso.weights"),
    ),
    "archive": (
        *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst", ".rar"),
        *(".whl", ".parquet", ".arrow"),
    ),
    "code": (
        *(".py", ".pyc", ".pyi", ".pyx", ".ipynb", ".sh", ".bash", ".bat", ".cmd", ".ps1"),
        *(".js", ".mjs", ".ts", ".so", ".dll", ".dylib", ".exe", ".jar", ".c", ".cc", ".cpp"),
        *(".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".java", ".cs", ".swift", ".lua", ".rb"),
    ),
}
_INDEX = re.compile(r".*\.(safetensors|bin|msgpack|h5)\.index(\.[^./]+)?\.json")
CARD_NAMES = frozenset({"README.md", ".gitattributes"})
"""Files that describe the source's repository; a container gets its own."""


def file_kind(name: str) -> FileKind:
    """Returns the kind of a file by its name or path, letters of either case alike."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    lower = name.lower()
    # Before the suffixes: an index ends in .json, but it goes with its weights.
    if _INDEX.fullmatch(lower):
        return "index"
    for kind, suffixes in _SUFFIXES.items():
        if lower.endswith(suffixes):
            return kind
    return "other"


def is_weights(kind: FileKind) -> bool:
    """Whether files of a kind hold weights."""
    return kind in ("safetensors", "pickle", "weights")


def uncopied_patterns() -> list[str]:
    """Returns glob patterns of the files that a conversion never reads.

    They are weights but safetensors, archives and hidden files.
    """
    kinds: tuple[FileKind, ...] = ("pickle", "weights", "archive")
    suffixes = [suffix for kind in kinds for suffix in _SUFFIXES[kind]]
    return [f"*{suffix}" for suffix in suffixes] + [".*"]
