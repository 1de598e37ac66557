from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def case():
    """`case.py`, next to this file."""
    spec = importlib.util.spec_from_file_location("gr1_case", Path(__file__).parent / "case.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
