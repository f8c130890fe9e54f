"""Elements -> planes of the tiles of a block, the encoder's fast path of scheme `lossless`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import native
from codecllm.formats.dtypes import DType


def split_tiles(
    elements: NDArray[np.unsignedinteger], dtype: DType, tile: int, symbols: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Splits the elements of tiles that follow one another into planes.

    Without the native core it works in the element's own width: about three passes over the
    elements and two for each plane.

    Args:
        elements: unsigned integers [n], the bits of elements.
        dtype: their type.
        tile: elements of a tile, 1 or more; the last may have fewer.
        symbols: uint8 [n * itemsize], receives plane 0 of the first tile, then its further planes,
            then those of the second tile and so on.

    Returns:
        The symbols; elements of one byte are their own, without a copy.
    """
    if dtype.bits == 8:
        return elements.view(np.uint8)
    if native.core is not None:
        native.core.split_tiles(elements, dtype.itemsize, dtype.rotates, tile, symbols)
        return symbols
    for begin in range(0, elements.size, tile):
        part = elements[begin : begin + tile]
        end = begin + part.size
        planes = symbols[dtype.itemsize * begin : dtype.itemsize * end].reshape(dtype.planes, -1)
        _split(part, dtype, planes)
    return symbols


def _split(elements: NDArray[np.unsignedinteger], dtype: DType, planes: NDArray[np.uint8]) -> None:
    if dtype.rotates:
        rotated_words = np.left_shift(elements, elements.dtype.type(1))
        scratch = np.right_shift(elements, elements.dtype.type(dtype.bits - 1))
        np.bitwise_or(rotated_words, scratch, out=rotated_words)
    else:
        rotated_words, scratch = elements, np.empty_like(elements)
    for k, plane in enumerate(planes):
        np.right_shift(rotated_words, elements.dtype.type(dtype.bits - 8 * (k + 1)), out=scratch)
        np.copyto(plane, scratch, casting="unsafe")
