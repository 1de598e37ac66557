"""A small run's checkpoints, for the tests of checkpoints and of what is stored in them."""

from __future__ import annotations

import shutil

import pytest

from tests.training import small_run


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    return small_run.save_steps(tmp_path_factory.mktemp("two") / "run", 2, 4, 6, keep=2)


@pytest.fixture
def workdir(two_steps, tmp_path):
    """A run's directory with checkpoints of steps 4 and 6, to be damaged."""
    return shutil.copytree(two_steps, tmp_path / "run")
