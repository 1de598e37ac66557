"""Evaluators of the trainer: when each measures, what they write together, and the closed loop among them."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from launch.rehearse import Processes
from uwm_jax import config as config_lib
from uwm_jax.config_checks import cadence
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.evaluation import in_training
from uwm_jax.evaluation.in_training import InTraining, InTrainingEvaluator, Measured
from uwm_jax.parallel.turns import Left


class Counts(InTrainingEvaluator):
    """All that another evaluator is."""

    name = "losses"  # whose `every` there is

    @property
    def metrics(self):
        return frozenset({"count"})

    def compile(self, params, frozen):
        self.params = params
        return [self.name]

    def measure(self, params, frozen, each):
        return Measured({"count": {"mean": float(sum(each(iter(range(4)))) + params)}}, {"by": self.name})


class More(Counts):
    name = "samples"

    def measure(self, params, frozen, each):
        return Measured({"more": {"mean": 1.0}}, {}, lambda folder: {"picture": folder / "picture.png"})


class Elsewhere(Counts):
    name, folder, prefix, record = "closed_loop", "elsewhere", "eval/elsewhere/", "record.json"


class Each:
    """In place of `Turns` and `Watchdog`: what they give on, and an end before the item of a number."""

    def __init__(self, end: int | None = None):
        self.end, self.given = end, 0

    def each(self, items, waits_for=None):
        for item in items:
            if self.given == self.end:
                raise Left
            self.given += 1
            yield item


def trainer(monkeypatch, **every):
    config = config_lib.base()
    config.total_steps, config.eval.every, config.eval.closed_loop.env = 10, 5, "pusht"
    for name, value in every.items():
        config.eval[name].every = value
    monkeypatch.setattr(in_training, "EVALUATORS", (Counts, More, Elsewhere))
    program = SimpleNamespace(config=config, like=SimpleNamespace(eval_params="shapes"))
    data = SimpleNamespace(waits_for=lambda: "data")
    return InTraining(program, data, {}, command=["python"], draw=None)


def evaluate(evaluations, workdir, step, turns):
    watchdog = SimpleNamespace(each=lambda step, items: items)
    state = SimpleNamespace(eval_params=100, ema_params=None)
    return evaluations.evaluate(workdir, step, state, {}, turns, watchdog)


def test_each_has_a_cadence_and_those_of_a_folder_write_together(monkeypatch, tmp_path):
    evaluations = trainer(monkeypatch, samples=0, closed_loop=3)
    due = {step: [e.name for e in evaluations.due(step)] for step in (1, 3, 5, 10)}
    assert due == {1: [], 3: ["closed_loop"], 5: ["losses"], 10: ["losses", "closed_loop"]}
    assert evaluations.metrics == {"eval/count", "eval/elsewhere/count"}
    assert evaluate(evaluations, tmp_path, 1, Each()) == ({}, {})

    evaluations = trainer(monkeypatch)
    means, files = evaluate(evaluations, tmp_path, 5, Each())
    assert means == {"eval/count": 106.0, "eval/more": 1.0, "eval/elsewhere/count": 106.0}
    assert files == {"eval/picture": tmp_path / "eval" / "5" / "picture.png"}
    here, there = (
        json.loads((tmp_path / folder / "5" / "metrics.json").read_text()) for folder in ("eval", "elsewhere")
    )
    assert here.keys() == {"count", "more"} and there.keys() == {"count"}
    about = json.loads((tmp_path / "eval" / "5" / "about.json").read_text())
    assert about["by"] == "losses" and about["command"] == ["python"] and about["parameters"] == "raw"


@pytest.mark.parametrize(("end", "written"), [(2, set()), (5, {"eval/count", "eval/more"})])
def test_a_run_that_ends_leaves_out_what_is_not_complete(monkeypatch, tmp_path, capsys, end, written):
    means, _ = evaluate(trainer(monkeypatch), tmp_path, 5, turns := Each(end))
    assert means.keys() == written and turns.given == end
    assert (tmp_path / "eval").exists() == bool(written) and not (tmp_path / "elsewhere").exists()
    assert capsys.readouterr().out.count("the evaluation of step 5 is left out") == (1 if written else 2)


def test_a_closed_loop_is_checked_before_anything_is_compiled(tiny_config):
    spec = DataSpec(
        WindowSpec.from_config(tiny_config.data.window), {"wrist": (16, 16)}, {"state": 7}, 10, 0, Normalizer()
    )
    tiny_config.eval.every = 2
    in_training.check_config(tiny_config)  # without an environment there is nothing to check
    assert not cadence(tiny_config, "closed_loop")
    fields = tiny_config.eval.closed_loop
    fields.env, fields.execute = "other", 4
    with pytest.raises(UserError, match=r"config\.eval\.closed_loop\.env=other: there is no such environment"):
        in_training.check_config(tiny_config)
    pytest.importorskip("gym_pusht")
    fields.env = "pusht"
    in_training.check_config(tiny_config)
    fields.execute = 5
    with pytest.raises(UserError, match=r"config\.eval\.closed_loop\.execute=5: expected 1 to 4"):
        in_training.check_config(tiny_config)
    data = SimpleNamespace(spec=spec, held_out=lambda number: None)
    with pytest.raises(UserError, match=r"config\.eval\.closed_loop\.env=pusht is not what(.|\n)*camera 'wrist'"):
        in_training.check_data(tiny_config, data)
    fields.every = 0
    in_training.check_data(tiny_config, data)


def test_fields_of_the_closed_loop_are_judged_together(tiny_config):
    def refused(message, **fields):
        config = tiny_config.copy_and_resolve_references()
        config.eval.closed_loop.update(fields)
        with pytest.raises(UserError, match=message):
            config_lib.validate(config)

    refused("closed_loop.every=2 requires a simulator: set config.eval.closed_loop.env", every=2)
    refused(r"closed_loop\.every: expected -1", every=-2)
    refused(r"closed_loop\.episodes: expected a number of at least 1", episodes=0)


POLICY, LOSS, ROLLOUT = "eval/policy/action_mse", "eval/loss/action", "eval/rollout/policy/max_coverage"


@pytest.mark.parametrize(
    ("best", "fields", "message"),
    [
        ("policy/action_mse", {"every": 2}, "expected a metric of evaluations in training"),
        ("eval/count", {"every": 2}, "expected a metric of evaluations in training"),
        ("eval//action_mse", {"every": 2}, "expected a metric of evaluations in training"),
        (POLICY, {}, r"requires evaluations in training: set config.eval.every\."),
        (LOSS, {"every": 2, "losses.every": 0}, r"requires .* set config.eval.losses.every\."),
        (ROLLOUT, {"every": 2}, r"set config.eval.every and config.eval.closed_loop.env"),
        (POLICY, {"every": 3}, r"\(config.eval.every=3\) .* expected one of them to be a multiple"),
        (LOSS, {"every": 2, "losses.every": 3}, r"\(config.eval.losses.every=3\)"),
        (POLICY, {"every": 2, "losses.every": 3}, ""),
        (POLICY, {"every": 4}, ""),
        (LOSS, {"losses.every": 1}, ""),
    ],
)
def test_the_best_checkpoint_is_one_that_is_measured(tiny_config, best, fields, message):
    tiny_config.checkpoint.every, tiny_config.checkpoint.keep_best, tiny_config.eval.every = 2, best, 0
    tiny_config.update_from_flattened_dict({f"eval.{name}": value for name, value in fields.items()})
    if not message:
        return in_training.check_config(tiny_config)
    with pytest.raises(UserError, match=message):
        in_training.check_config(tiny_config)


@pytest.mark.slow
@pytest.mark.multihost
def test_processes_act_together_with_parameters_that_are_cut(tmp_path):
    pytest.importorskip("gym_pusht")
    found = []
    for count in (1, 2):
        output = tmp_path / f"{count}.npz"
        command = [sys.executable, "-m", "tests.evaluation.acting_processes", f"--output={output}"]
        with Processes(count, command, os.environ) as processes:
            assert processes.wait(400) == [0] * count, processes.lines
        found.append(np.load(output))
    alone, together = found
    assert together["actions"].shape == (3, 24, 2) and together["actions"].std(axis=(1, 2)).min() > 1
    np.testing.assert_allclose(together["actions"], alone["actions"], atol=0.01)  # of 512 pixels
    np.testing.assert_allclose(together["scores"], alone["scores"], atol=1e-4)
