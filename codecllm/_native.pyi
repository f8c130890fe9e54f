"""The native core: see `codecllm.formats.native` and `native/core.h`.

Arguments are C-contiguous buffers.
"""

from collections.abc import Sequence
from typing import Any

Buffer = Any

def interface() -> int: ...
def xxh3(data: Buffer, /) -> int: ...
def check_slots(slots: Buffer, records: Buffer, raw_bytes: Buffer, /) -> int: ...
def rans_decode(
    stored: Buffer, frequencies: Buffer, precision: int, symbols: Buffer, /
) -> bool: ...
def rans_encode(symbols: Buffer, frequencies: Buffer, precision: int, /) -> bytes: ...
def rans_fit(counts: Buffer, log2_table: Buffer, /) -> tuple[int, bytes]: ...
def histogram(symbols: Buffer, stride: int = ..., /) -> bytes: ...
def split_tiles(
    elements: Buffer, itemsize: int, rotate: bool, tile: int, symbols: Buffer, /
) -> None: ...
def quantize_rows(
    descriptor: int,
    offset: int,
    type: int,
    absmax: Buffer,
    codes: Buffer,
    scratch: Buffer,
    /,
) -> tuple[int, float]: ...
def pack_chunks(
    symbols: Buffer,
    raw_bytes: Buffer,
    groups: tuple[int, int],
    codec: int,
    low_bits: Buffer | None,
    frames: list[Buffer | None] | None,
    log2_table: Buffer | None,
    out: tuple[Buffer, Buffer, Buffer],
    scratch: Buffer | None,
    /,
) -> tuple[int, list[bytes]]: ...
def row_largest(words: Buffer, itemsize: int, out: Buffer, /) -> None: ...
def quantize(
    words: Buffer, itemsize: int, scales: Buffer, by_column: bool, codes: Buffer, /
) -> float: ...
def decode_run(
    slots: Buffer,
    records: Buffer,
    given: Sequence[Buffer | None] | None,
    checked: bool,
    grid: tuple[int, int, int, int],
    tiles: tuple[int, int],
    planes: int,
    tables: tuple[Buffer | None, Buffer | None],
    groups: tuple[int, int],
    finish: int,
    target: int,
    rotate: bool,
    boolean: bool,
    itemsize: int,
    sides: tuple[Buffer | None, bool, Buffer | None, Buffer | None],
    out: Buffer,
    scratch: Buffer,
    /,
) -> int: ...
def scratch_bytes(grid: tuple[int, int, int, int], planes: int, /) -> int: ...
def kernels() -> tuple[str, ...]: ...
def in_use() -> str: ...
def use(name: str, /) -> None: ...
