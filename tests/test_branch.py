"""A run whose learning rate decays at its end, and branches of it: the straight run's losses, to the last bit."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import jax
import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.reporting import run_page
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints

PEAK = 1e-3


def config_of(make, total_steps, branch_from=""):
    """Three steps between checkpoints, of which the newest alone stays; a decay over the last two steps."""
    config = make()
    config.total_steps, config.log_every, config.branch_from = total_steps, 1, branch_from
    config.checkpoint.every, config.checkpoint.keep = 3, 1
    config.optimizer.learning_rate = PEAK
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.decay_steps = "wsd", 2, 2
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_tiny_config):
    """The workdirs of straight runs by their number of steps."""
    root = tmp_path_factory.mktemp("straight")
    with contextlib.redirect_stdout(io.StringIO()):
        for total_steps in (6, 8):
            train(config_of(make_tiny_config, total_steps), root / str(total_steps))
    return {total_steps: root / str(total_steps) for total_steps in (6, 8)}


def steps_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def numbers(workdir, after=0):
    """{step: all that was logged but for times} of the steps after one."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("samples_per_second", "data_wait_fraction", "goodput", "time/")
    return {x["step"]: {k: v for k, v in x.items() if not k.startswith(clock)} for x in lines if x["step"] > after}


def assert_same_end(workdir, straight, step):
    found, expected = (Checkpoints(w, read_only=True) for w in (workdir, straight))
    assert found.assets(step)["digests"]["arrays"] == expected.assets(step)["digests"]["arrays"], "state and codec"
    assert found.assets(step)["digests"]["json"] == expected.assets(step)["digests"]["json"], "the data's position"


@pytest.mark.slow
def test_a_branch_makes_the_steps_of_a_straight_run(runs, make_tiny_config, tmp_path, capsys):
    assert steps_of(runs[6]) == [4, 6] and steps_of(runs[8]) == [6, 8], "the last before the decay, and the newest"
    rates = [x["learning_rate"] / PEAK for x in numbers(runs[6]).values()]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 1, 1 - np.sqrt(0.5)], rtol=1e-6)
    shorter, longer = numbers(runs[6]), numbers(runs[8])
    assert all(shorter[step] == longer[step] for step in (1, 2, 3, 4, 5))

    longer_config = config_of(make_tiny_config, 8)
    with pytest.raises(UserError, match=rf"--config.branch_from={runs[6]}@4$|--config.branch_from={runs[6]}@4\."):
        train(longer_config, runs[6])

    same, branch = tmp_path / "same", tmp_path / "branch"
    train(config_of(make_tiny_config, 6, f"{runs[6]}@4"), same)
    assert numbers(same) == numbers(runs[6], after=4)
    assert_same_end(same, runs[6], 6)

    train(config_of(make_tiny_config, 8, f"{runs[6]}@4"), branch)
    assert f"branching from step 4 of {runs[6]}\n" in capsys.readouterr().out, "the rate stays as it was"
    assert numbers(branch) == numbers(runs[8], after=4)
    assert_same_end(branch, runs[8], 8)

    # A branch continues as any run does; its trunk is history.
    assert config_lib.read(branch).branch_from == f"{runs[6]}@4" and steps_of(branch) == [6, 8]
    shutil.rmtree(branch / "checkpoints" / "8")
    hidden = runs[6].with_name("hidden")
    runs[6].rename(hidden)
    try:
        train(config_of(make_tiny_config, 8, f"{runs[6]}@4"), branch)
    finally:
        hidden.rename(runs[6])
    assert "continuing from step 6\n" in capsys.readouterr().out
    assert numbers(branch) == numbers(runs[8], after=4)
    assert_same_end(branch, runs[8], 8)
    page = run_page.write(branch).read_text()
    assert f"<dt>Branched</dt><dd>from {runs[6]}@4</dd>" in page


@pytest.mark.slow
def test_a_branch_of_a_branch_under_another_schedule(runs, make_tiny_config, tmp_path):
    config = config_of(make_tiny_config, 9, f"{runs[8]}@6")
    config.optimizer.schedule, config.optimizer.warmup_steps, config.mesh.data = "constant", 0, 1
    train(config, tmp_path / "one")
    assert [x["learning_rate"] for x in numbers(tmp_path / "one").values()] == [np.float32(PEAK)] * 3
    config.branch_from, config.total_steps = f"{tmp_path / 'one'}@9", 10
    train(config, tmp_path / "two")
    past = Checkpoints(tmp_path / "two", read_only=True).assets(10)
    assert past["branched_from"] == [f"{runs[8]}@6", f"{tmp_path / 'one'}@9"]
    assert past["learned_from"] == Checkpoints(runs[8], read_only=True).assets(6)["learned_from"]
    counts = Checkpoints(tmp_path / "two", read_only=True).restore_arrays(10, "train_state")
    assert {int(x) for x in jax.tree.leaves(counts) if x.dtype == np.int32} == {10}, "step and moments count on"
