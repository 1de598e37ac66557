"""A small run's checkpoints, for the tests of checkpoints and of what is stored in them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_run():
    """The module `small_run.py`."""
    spec = importlib.util.spec_from_file_location("small_run", Path(__file__).with_name("small_run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def two_steps(small_run, tmp_path_factory):
    return small_run.save_steps(tmp_path_factory.mktemp("two") / "run", 2, 4, 6, keep=2)


@pytest.fixture
def workdir(two_steps, tmp_path):
    """A run's directory with checkpoints of steps 4 and 6, to be damaged."""
    return shutil.copytree(two_steps, tmp_path / "run")
