"""The native core against numpy and the slow references.

The same bits, from every set of kernels, and no wrong byte passes.
"""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from codecllm.formats.codecs import native

pytestmark = pytest.mark.skipif(native.core is None, reason=f"native core: {native.describe()}")
KERNELS = native.core.kernels() if native.core is not None else ("none",)


@pytest.fixture(params=KERNELS)
def core(request):
    before = native.core.in_use()
    native.core.use(request.param)
    yield native.core
    native.core.use(before)


def test_checksums_of_slots_of_every_size(core):
    data = np.random.default_rng(0).bytes(1 << 17)
    for size in [*range(16, 3000, 16), 1 << 13, 65552, 1 << 17]:
        assert core.xxh3(data[:size]) == xxhash.xxh3_64_intdigest(data[:size])
