"""Splits elements into the byte planes of `lossless`; the reference is in `formats.schemes`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import native
from codecllm.formats.dtypes import DType


def split_planes(elements: NDArray[np.unsignedinteger], dtype: DType) -> list[NDArray[np.uint8]]:
    """Splits unsigned integers [n], the bits of elements, into uint8 [n] planes, plane 0 first.

    Without the native core it works in the element's own width: about three passes over the
    elements and two for each plane.
    """
    if dtype.bits == 8:
        return [elements.view(np.uint8)]
    if native.core is not None:
        split = np.empty((dtype.planes, elements.size), np.uint8)
        native.core.split_planes(elements, dtype.itemsize, dtype.rotates, split)
        return list(split)
    if dtype.rotates:
        rotated_words = np.left_shift(elements, elements.dtype.type(1))
        scratch = np.right_shift(elements, elements.dtype.type(dtype.bits - 1))
        np.bitwise_or(rotated_words, scratch, out=rotated_words)
    else:
        rotated_words, scratch = elements, np.empty_like(elements)
    planes = []
    for k in range(dtype.planes):
        plane = np.empty(elements.size, np.uint8)
        np.right_shift(rotated_words, elements.dtype.type(dtype.bits - 8 * (k + 1)), out=scratch)
        np.copyto(plane, scratch, casting="unsafe")
        planes.append(plane)
    return planes
