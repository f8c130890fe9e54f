"""Models and containers of the integration tests."""

from __future__ import annotations

from tests.integration.conftest import container, tiny

__all__ = ["container", "tiny"]
