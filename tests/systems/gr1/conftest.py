from __future__ import annotations

import pytest

from tests.systems.gr1 import case as module


@pytest.fixture(scope="session")
def case():
    """`case.py`, next to this file."""
    return module
