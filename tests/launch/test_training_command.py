"""The parts of a run's command, as launchers read them."""

from __future__ import annotations

import pytest

from launch.training_command import TrainingCommand, read, with_slices
from uwm_jax.errors import UserError

TRAIN = ["python", "-m", "uwm_jax.train", "--config=a.py:x", "--workdir", "gs://b/runs/x", "--config.batch_size=8"]


def test_the_parts():
    assert read(TRAIN) == TrainingCommand("uwm_jax.train", "a.py:x", "gs://b/runs/x", (("batch_size", "8"),), ())
    sweep = read(["python", "-m", "launch.sweep", "--grid=seed=0,1", "--grid", "a=1", "--config=a.py", "--config=b.py"])
    assert (sweep.grid, sweep.config, sweep.workdir) == (("seed=0,1", "a=1"), "b.py", "")


@pytest.mark.parametrize("command", [[], ["uwm-train"], ["python", "-m"], ["bash", "-c", "x"]])
def test_only_modules_of_python_are_started(command):
    with pytest.raises(UserError, match="expected a command after --"):
        read(command)


def test_a_run_is_told_of_its_slices():
    assert with_slices(TRAIN, 1) == TRAIN
    assert with_slices(TRAIN, 2) == [*TRAIN, "--config.mesh.slices=2"]
    told = [*TRAIN, "--config.mesh.slices=4"]
    assert with_slices(told, 2) == told
    copy = ["python", "-m", "data_prep.copy", "--input=gs://b/x"]
    assert with_slices(copy, 2) == copy
