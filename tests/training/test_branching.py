"""Places that a branch may start from, what may differ in it, and runs that go on only as one.

Real runs are in tests/test_branch.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests.hub.conftest import loopback as loopback
from tests.hub.conftest import stub as stub
from tests.hub.stub import Stub
from tests.training import small_run
from uwm_jax.config import base
from uwm_jax.errors import UserError
from uwm_jax.hub.runs import spelled
from uwm_jax.training import branching
from uwm_jax.training.workdir import write_config


@pytest.fixture
def trunk(workdir):
    """A run of the default config with checkpoints of steps 4 and 6."""
    write_config(workdir, base())
    return workdir


@pytest.fixture
def config(trunk):
    config = base()
    config.branch_from = f"{trunk}@4"
    return config


def test_the_schedule_and_what_may_change_in_any_run_may_differ(trunk, config):
    config.total_steps, config.accumulation_steps, config.checkpoint.keep = 500, 2, 1
    config.optimizer.schedule, config.optimizer.decay_steps, config.optimizer.warmup_steps = "wsd", 100, 7
    stored = branching.open_trunk(config)
    assert (stored.step, stored.workdir, stored.data_iter["position"]) == (4, trunk, 32)
    small_run.assert_is_step(branching.restore(stored, small_run.like()), 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("batch_size", 72),
        ("model.depth", 3),
        ("loss.weights.action", 2.0),
        ("optimizer.learning_rate", 1e-3),
        ("optimizer.ema_decay", 0.9),
        ("init_from", "runs/other"),
    ],
)
def test_anything_else_is_refused_by_name(config, field, value):
    *parents, leaf = field.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    with pytest.raises(UserError, match=rf"config\.{field} is .*but the run of config.branch_from=.* was started with"):
        branching.open_trunk(config)


def test_a_trunk_on_the_hub(stub: Stub, trunk: Path, config: ConfigDict) -> None:
    """It is read in the cache, where it stays as it is; the branch keeps its commit."""
    commit = stub.add("me/trunk", {str(p.relative_to(trunk)): p.read_bytes() for p in trunk.rglob("*") if p.is_file()})
    config.branch_from = "me/trunk@main@4"
    stored = branching.open_trunk(config)
    assert (stored.step, spelled(stored.workdir), stored.data_iter["position"]) == (4, f"me/trunk@{commit}", 32)
    small_run.assert_is_step(branching.restore(stored, small_run.like()), 4)
    for spec, message in (
        ("me/trunk@main", r"expected DIR@STEP, .* \[4, 6\] .*\(or, on the hub, owner/name@revision@STEP\)"),
        ("me/trunk@4", "has no branch, tag or commit '4'.* A step is written me/trunk@REVISION@STEP"),
        ("me/trunk@main@5", r"has checkpoints of steps \[4, 6\]"),
    ):
        config.branch_from = spec
        with pytest.raises(UserError, match=f"config.branch_from=.*{message}"):
            branching.open_trunk(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}@5", r"has checkpoints of steps \[4, 6\]"),
        ("{}", r"expected DIR@STEP, with one of the steps \[4, 6\]"),
        ("{}/nowhere@4", "holds no config.json"),
        ("{}@last", "DIR@STEP with an integer"),
    ],
)
def test_a_place_that_is_none_is_named_with_those_there_are(trunk, config, spec, message):
    config.branch_from = spec.format(trunk)
    with pytest.raises(UserError, match=f"config.branch_from=.*{message}"):
        branching.open_trunk(config)


def test_a_branch_needs_steps_to_make(config):
    config.total_steps = 4
    with pytest.raises(UserError, match="expected a step below config.total_steps=4"):
        branching.open_trunk(config)


@pytest.mark.parametrize("item", ["data_iter", "codec", "params"])
def test_a_damaged_checkpoint_names_the_others(trunk, config, item):
    small_run.flip(small_run.largest_file(trunk / "checkpoints" / "4" / item))
    with pytest.raises(UserError, match=r"config.branch_from.*checkpoints/4/.*Name another step of \[4, 6\]"):
        branching.restore(branching.open_trunk(config), small_run.like())


def test_a_run_whose_rate_has_begun_to_fall_is_not_made_longer(trunk):
    before = base()
    before.total_steps, before.optimizer.schedule, before.optimizer.decay_steps = 8, "wsd", 3  # from step 5 on
    config = before.copy_and_resolve_references()
    config.total_steps = 20
    with pytest.raises(UserError) as error:
        branching.refuse_longer(trunk, config, before, 6)
    message = str(error.value)
    assert "config.total_steps is 20, was 8" in message and "began after step 5" in message
    assert f"--config.branch_from={trunk}@4" in message
    before.optimizer.decay_steps = 5
    with pytest.raises(UserError, match="began after step 3 .*No checkpoint from before it is left"):
        branching.refuse_longer(trunk, config, before, 6)


def test_other_runs_may_be_made_longer(trunk):
    before = base()
    before.total_steps, before.optimizer.decay_steps = 8, 3
    longer = before.copy_and_resolve_references()
    longer.total_steps = 20
    branching.refuse_longer(trunk, longer, before, 6)  # no decay
    before.optimizer.schedule = longer.optimizer.schedule = "wsd"
    branching.refuse_longer(trunk, before, before, 6)  # no more steps
    branching.refuse_longer(trunk, longer, before, 5)  # the newest is the last one before the decay
