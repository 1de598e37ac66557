"""The checkpoints that stay: the newest, every Nth, the best one by a metric, and the last before the rate decays."""

from __future__ import annotations

import json

import pytest

from tests.training import small_run
from uwm_jax.config import base
from uwm_jax.errors import UserError
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.retention import Retention

METRIC = "eval/policy/action_mse"


def write_metrics(workdir, values):
    lines = [{"step": step} | ({METRIC: value} if value is not None else {}) for step, value in values.items()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def survivors(retention, steps, workdir):
    """Steps on disk after each of `steps` was saved and the surplus deleted."""
    there = []
    for step in steps:
        there.append(step)
        surplus = retention.surplus(there, workdir)
        assert step not in surplus, "the newest is what a run continues from"
        there = [s for s in there if s not in surplus]
    return there


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [2, 4, 6, 8, 9, 10, 12]),
        (Retention(1), [12]),
        (Retention(2), [10, 12]),
        (Retention(2, every=4), [4, 8, 10, 12]),
        (Retention(2, best=METRIC), [6, 10, 12]),
        (Retention(1, every=4, best=METRIC, mode="max"), [2, 4, 8, 12]),
        (Retention(1, before=9), [9, 12]),
        (Retention(1, before=7), [6, 12]),
        (Retention(2, before=1), [10, 12]),
        (Retention(1, every=4, before=100), [4, 8, 12]),
    ],
)
def test_the_newest_the_multiples_and_the_best_stay(tmp_path, retention, kept):
    write_metrics(tmp_path, {2: 0.9, 4: 0.5, 6: 0.1, 7: 0.0, 8: 0.3, 9: None, 10: 0.2, 12: 0.4})
    assert survivors(retention, [2, 4, 6, 8, 9, 10, 12], tmp_path) == kept


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equal_values_the_later_step_stays(tmp_path, mode):
    write_metrics(tmp_path, dict.fromkeys((2, 4, 6, 8), 0.5) | {8: None})
    assert Retention(1, best=METRIC, mode=mode).surplus([2, 4, 6, 8], tmp_path) == [2, 4]


def test_without_a_measured_value_only_the_newest_stay(tmp_path):
    assert Retention(2, best=METRIC).surplus([2, 4, 6], tmp_path) == [2]  # no metrics.jsonl
    write_metrics(tmp_path, {2: None, 4: None})
    assert Retention(2, best=METRIC).surplus([2, 4, 6], tmp_path) == [2]


def test_a_continued_run_goes_on_keeping_what_was_best(tmp_path):
    """The decision is taken from the files, so it does not depend on how often the run was started again."""
    retention = Retention(1, every=6, best=METRIC)
    values = {2: 0.3, 4: 0.1, 6: 0.5, 8: 0.4, 10: 0.2}

    def save(checkpoints, step):
        write_metrics(tmp_path, {s: v for s, v in values.items() if s <= step})
        checkpoints.save(small_run.state_at(step), {"position": step}, small_run.CODEC, small_run.assets_of())
        checkpoints.wait()

    checkpoints = Checkpoints(tmp_path, retention)
    for step in (2, 4, 6, 8):
        save(checkpoints, step)
    assert checkpoints.steps() == [4, 6, 8]
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, retention)
    state, stored = checkpoints.restore_latest(small_run.like())
    assert stored.step == 8 and checkpoints.steps() == [4, 6, 8], "nothing is deleted before a newer one is complete"
    small_run.assert_is_step(state, 8)
    save(checkpoints, 10)
    assert checkpoints.steps() == [4, 6, 10]
    checkpoints.close()


def test_nothing_is_deleted_where_the_metrics_cannot_be_read(tmp_path, monkeypatch, capfd):
    def fail(_):
        raise OSError(13, "Permission denied", "metrics.jsonl")

    monkeypatch.setattr("uwm_jax.training.checkpoints.retention.read_metrics", fail)
    checkpoints = Checkpoints(tmp_path, Retention(1, best=METRIC))
    for step in (2, 4):
        checkpoints.save(small_run.state_at(step), {}, small_run.CODEC, small_run.assets_of())
    checkpoints.close()
    assert checkpoints.steps() == [2, 4]
    assert "warning: no old checkpoint is deleted: [Errno 13] Permission denied" in capfd.readouterr().err


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are():
    measured = {"eval/loss/action", METRIC}
    Retention(1).check(measured)
    Retention(1, best=METRIC).check(measured)
    with pytest.raises(UserError, match=r"keep_best='eval/polcy/action_mse'.*mean eval/policy/action_mse.*eval/loss/"):
        Retention(1, best="eval/polcy/action_mse").check(measured)


def test_how_many_lie_on_disk_at_most():
    assert Retention().at_most(100) is None
    assert Retention(3).at_most(100) == 4
    assert Retention(3, every=40, best=METRIC).at_most(100) == 7
    assert Retention(3, every=40, best=METRIC, before=80).at_most(100) == 8


def test_of_a_config_the_last_before_its_decay_stays():
    config = base()
    assert Retention.of(config).before is None
    config.total_steps, config.optimizer.schedule, config.optimizer.decay_steps = 100, "wsd", 20
    assert Retention.of(config).before == 80
