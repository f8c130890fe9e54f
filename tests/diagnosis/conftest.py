"""Tiny models, as the integration tests make them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.integration.conftest import container, tiny

__all__ = ["container", "tiny"]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Products of 64 x 64 cost less than waking a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
