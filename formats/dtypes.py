"""Element types: names of safetensors, sizes, and the byte planes of scheme `lossless`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of safetensors.

    Attributes:
        name: spelling in a safetensors header.
        bits: size of one element in bits.
        is_float: IEEE-like floating point with sign, exponent and mantissa.
        planes: number of byte planes under `lossless`; 0 where that scheme does not take the type.
        rotates: whether `lossless` rotates the element left by one bit first, so that the exponent
            fills a byte.
    """

    name: str
    bits: int
    is_float: bool
    planes: int
    rotates: bool

    @property
    def itemsize(self) -> int:
        """Bytes per element; only for types of whole bytes."""
        return self.bits // 8


_TABLE = (
    DType("BF16", 16, True, 2, True),
    DType("F16", 16, True, 2, True),
    DType("F32", 32, True, 4, True),
    DType("F64", 64, True, 8, True),
    DType("F8_E4M3", 8, True, 1, False),
    DType("F8_E5M2", 8, True, 1, False),
    # Scales of block formats, and types whose elements do not fill bytes, are stored plainly.
    DType("F8_E8M0", 8, True, 0, False),
    DType("F6_E2M3", 6, True, 0, False),
    DType("F6_E3M2", 6, True, 0, False),
    DType("F4", 4, True, 0, False),
    DType("I8", 8, False, 1, False),
    DType("I16", 16, False, 2, False),
    DType("I32", 32, False, 4, False),
    DType("I64", 64, False, 8, False),
    DType("U8", 8, False, 1, False),
    DType("U16", 16, False, 2, False),
    DType("U32", 32, False, 4, False),
    DType("U64", 64, False, 8, False),
    DType("BOOL", 8, False, 1, False),
    DType("C64", 64, False, 0, False),
)
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}

INT8_SOURCES = frozenset({"BF16", "F16", "F32"})
"""Element types that scheme `int8` quantizes.

Others lose more than the scheme states, or nothing is gained.
"""
