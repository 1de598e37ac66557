"""Fixtures of the tests of torch modules."""

from __future__ import annotations

import pytest


@pytest.fixture
def one_thread():
    """Torch on one thread: models as small as those of tests only wait for each other's threads."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
