"""Options of a conversion: objects that are checked when they are made and then passed on whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from codecllm.formats.arguments.check import (
    Check,
    check_fields,
    choice,
    flag,
    instance,
    integer,
    number,
    optional,
    path,
    refusal,
    text,
)
from codecllm.formats.codecs import CodecName
from codecllm.formats.errors import UsageError, shown
from codecllm.formats.machine import cores
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS

Scheme = Literal["int8", "lossless"]
NonFinite = Literal["error", "lossless"]
Quality = Literal["high", "balanced", "small"]

QUALITIES: dict[Quality, float] = {"high": 6.0, "balanced": 5.0, "small": 4.0}
"""Named rates, in bits per quantized weight; docs/bits.md has the figures behind them."""

MIN_BITS, MAX_BITS = 2.0, 8.0
"""The rates that can be asked for, in bits per quantized weight."""

MIN_CODE_BITS, MAX_CODE_BITS = 2, 8
"""The widths of codes that can be asked for: those of packed exports."""

# At 4 KiB a chunk's record and padding take 0.6 % of it; smaller chunks would waste more.
MIN_CHUNK_KIB, MAX_CHUNK_KIB = 4, 1024
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


USEFUL_THREADS = 16
"""Most threads that encode without being asked for; more have not been measured.

On 16 hardware threads 16 of them convert 2.7 to 3.0 GB of source a second, 8 of them 2.4.
"""


_RATE_CHECKS: dict[str, Check] = {
    "bits": optional(
        number(f"{MIN_BITS:g} to {MAX_BITS:g}", lambda bits: MIN_BITS <= bits <= MAX_BITS)
    ),
    "ratio": optional(number("more than 1", lambda ratio: ratio > 1)),
    "quality": optional(choice(QUALITIES)),
    "code_bits": optional(integer(MIN_CODE_BITS, MAX_CODE_BITS)),
    "calibrate": optional(path),
    "refine": flag,
    "column_scales": flag,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The rate that a conversion is to reach, and the way to choose its quantization parameters.

    Exactly one of `bits`, `ratio`, `quality` and `code_bits` is given.

    Attributes:
        bits: bits per quantized weight, everything counted, 2 to 8.
        ratio: source bytes / stored bytes, above 1.
        quality: `high`, `balanced` or `small`: names for bits, see `QUALITIES`.
        code_bits: bits that hold every code of a linear layer, 2 to 8, for packed exports of that
            width. Steps of rows are as fine as that allows, columns have none, and the rate is what
            comes of it. Tables of embeddings, which such exports write plainly, keep 8 bits.
        calibrate: text from which sensitivities are learned: `text` (of several kinds, part of the
            package), `self` (the model writes it), `random` (random tokens), `none`, or a text
            file. None is `text`, or `none` where the model cannot run here.
        refine: whether codes of linear layers are chosen with error feedback. Needs a calibration.
        column_scales: whether columns may get scales beside those of rows, and codes more than 8
            bits. Without both the container can be exported packed (docs/exports.md), at a higher
            KL.

    Raises:
        UsageError: the fields contradict each other, or one is out of range.
    """

    bits: float | None = None
    ratio: float | None = None
    quality: Quality | None = None
    code_bits: int | None = None
    calibrate: str | Path | None = None
    refine: bool = False
    column_scales: bool = True

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, _RATE_CHECKS)
        targets = (self.bits, self.ratio, self.quality, self.code_bits)
        # No order of precedence: a second target is a mistake of the caller.
        if sum(target is not None for target in targets) != 1:
            got = f"bits {self.bits}, ratio {self.ratio}, quality {self.quality}"
            raise UsageError(
                "bits, ratio, quality and code_bits exclude one another: give one",
                got=f"{got}, code_bits {self.code_bits}",
            )
        if self.code_bits is not None:
            if self.calibrate not in (None, "none") and not self.refine:
                raise UsageError(
                    "code_bits takes steps from the largest weights: a calibration only refines",
                    got=f"calibrate {self.calibrate}",
                    expected="refine beside it",
                )
            if not self.column_scales:
                raise UsageError("code_bits makes no scales of columns in any case")
        if self.refine and self.calibrate == "none":
            raise UsageError(
                "refine needs a calibration: it feeds errors back by the inputs of each layer",
                got="calibrate none",
            )

    @property
    def target_bits(self) -> float | None:
        """Bits per quantized weight, or None where a ratio is the target.

        Examples:
            >>> Rate(quality="balanced").target_bits
            5.0
        """
        return self.bits if self.quality is None else QUALITIES[self.quality]

    @property
    def has_columns(self) -> bool:
        """Whether columns may get scales, and codes more than 8 bits."""
        return self.column_scales and self.code_bits is None


def requested_rate(
    bits: float | None = None,
    ratio: float | None = None,
    quality: Quality | None = None,
    code_bits: int | None = None,
    calibrate: str | Path | None = None,
    refine: bool = False,
    column_scales: bool = True,
) -> Rate | None:
    """Returns the rate that these fields of `Rate` describe, or None where none is asked for.

    Raises:
        UsageError: `calibrate`, `refine` or `column_scales` stands without a rate, or see `Rate`.
    """
    fields: dict[str, Any] = {
        "bits": bits,
        "ratio": ratio,
        "quality": quality,
        "code_bits": code_bits,
        "calibrate": calibrate,
        "refine": refine,
        "column_scales": column_scales,
    }
    if any(target is not None for target in (bits, ratio, quality, code_bits)):
        return Rate(**fields)
    for name, value in fields.items():
        _RATE_CHECKS[name](value, name)
    if calibrate is not None:
        raise UsageError(
            "calibrate needs bits, ratio or quality: plain int8 takes its steps from the largest "
            "weights"
        )
    if refine:
        raise UsageError(
            "refine needs bits, ratio, quality or code_bits: plain int8 rounds to nearest"
        )
    if not column_scales:
        raise UsageError(
            "no column scales: that needs bits, ratio or quality, plain int8 has none in any case"
        )
    return None


_OPTION_CHECKS: dict[str, Check] = {
    "scheme": choice(get_args(Scheme)),
    "codec": choice(get_args(CodecName)),
    "rate": optional(instance(Rate)),
    "non_finite": choice(get_args(NonFinite)),
    "chunk_kib": integer(MIN_CHUNK_KIB, MAX_CHUNK_KIB),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        scheme: `int8` (per output channel) or `lossless`.
        codec: `zstd`, or `rans`: smaller, fastest on a GPU, and on a CPU slow without the native
            core.
        rate: the rate to reach (scheme `int8` only); None takes each channel's step from its
            largest weight.
        include: glob patterns of tensor names to quantize beside the default choice.
        exclude: glob patterns of tensor names not to quantize; they win over `include`.
        non_finite: `error` stops at NaN or infinite weights under int8, `lossless` keeps such
            tensors as they are.
        chunk_kib: most KiB of symbols in a chunk, 4 to 1024. Small chunks give a GPU more of them
            to decode at once, and cost a little size: more checksums and, with zstd, more code
            tables.
        max_shard_bytes: no shard is longer, unless one tensor is.
        workers: encoding threads, 1 or more; None takes one per core, at most 16. Never changes a
            byte.
        force: replace a container that is in the way.
        with_code: copy the repository's Python files (`auto_map`). They run only where a loading
            caller passes `trust_remote_code=True`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`: where the model runs that a rate is chosen by,
            and where its codes are refined. Another device may give other bytes.

    Raises:
        UsageError: a value is out of range, or a rate is asked of scheme `lossless`.
    """

    scheme: Scheme = "int8"
    codec: CodecName = "zstd"
    rate: Rate | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    non_finite: NonFinite = "error"
    chunk_kib: int = DEFAULT_TILE_SYMBOLS >> 10
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    workers: int | None = None
    force: bool = False
    with_code: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        check_fields(self, _OPTION_CHECKS, "max_shard_bytes", "workers", "force", "with_code")
        device = self.device if isinstance(self.device, str) else ""
        if re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device) is None:
            expected = "auto, cpu, cuda, cuda:N"
            raise UsageError("no such device", got=shown(self.device), expected=expected)
        if self.rate is not None and self.scheme != "int8":
            raise UsageError(
                "bits and ratio need scheme int8: lossless has no rate to choose", got=self.scheme
            )

    @property
    def threads(self) -> int:
        """Number of encoding threads."""
        return min(cores(), USEFUL_THREADS) if self.workers is None else self.workers


def _patterns(name: str, given: Any) -> tuple[str, ...]:
    """Returns patterns as a tuple: a string would count as one of single letters."""
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise refusal(given, name, "a list of strings")
    patterns = tuple(given)
    for pattern in patterns:
        text(pattern, name)
    return patterns


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the source model comes from, for the manifest.

    Attributes:
        repo: Hub repository, or None for a local folder.
        commit: its commit, 40 hex digits, or None.
    """

    repo: str | None = None
    commit: str | None = None
