"""Fixtures of coded weights.

Nothing is imported here that imports Triton: pytest imports this file before the options are known,
and Triton asks once whether its interpreter is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.loader.resident.cases import Case


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Returns a case for each form."""
    from tests.loader.resident.cases import make_cases

    return make_cases(tmp_path_factory.mktemp("coded"))


@pytest.fixture(params=["int8", "columns", "escapes", "compressed"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """Returns one case after another."""
    return cases[request.param]
