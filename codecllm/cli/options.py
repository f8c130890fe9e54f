"""Values and meanings that options of several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from codecllm.formats.errors import UsageError


class SchemeName(StrEnum):
    """Values of --scheme."""

    int8 = "int8"
    lossless = "lossless"


class CodecName(StrEnum):
    """Values of --codec."""

    zstd = "zstd"
    rans = "rans"


class QualityName(StrEnum):
    """Values of --quality."""

    high = "high"
    balanced = "balanced"
    small = "small"


class NonFiniteName(StrEnum):
    """Values of --non-finite."""

    error = "error"
    lossless = "lossless"


class LevelName(StrEnum):
    """Values of --level."""

    structure = "structure"
    checksums = "checksums"
    full = "full"


class ResidentName(StrEnum):
    """Values of --resident."""

    dense = "dense"
    int8 = "int8"
    compressed = "compressed"


class EvalDtypeName(StrEnum):
    """Values of eval's --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class FormatName(StrEnum):
    """Values of --format."""

    safetensors = "safetensors"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit, where the model is a Hub id.")
]
Workers = Annotated[
    int | None, typer.Option(help="Threads. Default: one per core. Never changes a byte.", min=1)
]


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as `5GB`, `512MiB` or `1000000`.

    Raises:
        UsageError: not a positive size.
    """
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
    }
    number = text.strip().rstrip("abgikmABGIKM")
    unit = text.strip()[len(number) :].lower()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as exc:
        raise UsageError("not a size", got=text, expected="for example 5GB or 512MiB") from exc
    if size < 1:
        raise UsageError("size must be positive", got=text)
    return size


def read_text(path: Path) -> str:
    """Returns the content of a text file.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"the text is not UTF-8 ({exc.reason})", file=str(path)) from exc
