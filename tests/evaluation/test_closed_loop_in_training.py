"""Closed loops of a run in training: what it writes, the episodes of its checkpoint, and SIGTERM."""

from __future__ import annotations

import json
import signal

import pytest

pytest.importorskip("gym_pusht")

from tests.pusht_run import make_config, make_demonstrations, same  # noqa: E402
from uwm_jax import cli, rollout  # noqa: E402
from uwm_jax.backend import JaxBackend  # noqa: E402
from uwm_jax.envs.parallel import ParallelEnvs  # noqa: E402
from uwm_jax.errors import Preempted  # noqa: E402
from uwm_jax.evaluation import closed_loop  # noqa: E402
from uwm_jax.train import train  # noqa: E402
from uwm_jax.training.inference import load_for_inference  # noqa: E402
from uwm_jax.training.telemetry.log import read_metrics  # noqa: E402


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    c = make_config(make_demonstrations(tmp_path_factory.mktemp("demonstrations") / "pusht"))
    c.eval.closed_loop.env, c.eval.closed_loop.every, c.eval.closed_loop.episodes = "pusht", 2, 2
    return c


@pytest.fixture(scope="module")
def acted():
    """The episodes of each closed loop of the training of `trained`."""
    return []


@pytest.fixture(scope="module")
def trained(config, acted, tmp_path_factory):
    workdir, act = tmp_path_factory.mktemp("trained") / "run", closed_loop.closed_loop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "closed_loop", lambda *args, **how: acted.append(act(*args, **how)) or acted[-1])
        train(config, workdir)
    return workdir


@pytest.mark.slow
def test_training_writes_what_the_command_does_of_the_policy(trained):
    folder = trained / "rollout" / "2"
    written = {file: json.loads((folder / file).read_text()) for file in ("metrics.json", "episodes.json")}
    logged = {
        name.removeprefix("eval/rollout/"): value
        for name, value in read_metrics(trained / "metrics.jsonl")[-1].items()
        if name.startswith("eval/")
    }
    assert logged == {name: value["mean"] for name, value in written["metrics.json"].items()}
    assert logged.keys() == {"policy/max_coverage", "policy/success", "policy/seam", "no_action/max_coverage"}
    arguments = ["rollout", f"--workdir={trained}", "--env=pusht", "--episodes=2", "--workers=1"]
    assert cli.call(rollout.main, arguments, rollout.define_flags) == 0
    again = {file: json.loads((folder / file).read_text()) for file in written}  # in the same place
    assert again["metrics.json"].items() >= written["metrics.json"].items()
    assert again["episodes.json"]["episodes"]["policy"] == written["episodes.json"]["episodes"]["policy"]
    changing = ("command", "time", "episodes")
    assert {k: v for k, v in again["episodes.json"].items() if k not in changing} == {
        k: v for k, v in written["episodes.json"].items() if k not in changing
    }


@pytest.mark.slow
def test_an_episode_of_training_is_that_of_the_checkpoint(trained, acted):
    system, params, frozen, step = load_for_inference(trained)
    assert step == 2 and len(acted) == 1
    again = closed_loop.closed_loop(
        JaxBackend(system, system.held(params), frozen), "pusht", [100_000, 100_001], workers=1
    )
    assert [e.seed for e in acted[0]] == [100_000, 100_001]
    assert all(same(a, b) for a, b in zip(acted[0], again, strict=True))
    assert acted[0][0].actions.std(axis=0).min() > 1  # pixels


@pytest.mark.slow
def test_sigterm_leaves_a_closed_loop_of_training_at_the_next_chunk(config, tmp_path, monkeypatch, capsys):
    config = config.copy_and_resolve_references()
    config.total_steps, workdir = 3, tmp_path / "run"
    calls, step = [], ParallelEnvs.step

    def terminate_in_the_second_chunk(self, *args):
        calls.append(self)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(ParallelEnvs, "step", terminate_in_the_second_chunk)
    with pytest.raises(Preempted, match="step 2 is saved"):
        train(config, workdir)
    assert len(calls) == 16 and not calls[0]._processes
    again = f"python -m uwm_jax.rollout --env=pusht --episodes=2 --execute=8 --workdir={workdir} --step=2"
    assert f"the evaluation of step 2 is left out; {again} makes up for it" in capsys.readouterr().out
    assert not (workdir / "rollout").exists()
    assert not any(name.startswith("eval/rollout") for line in read_metrics(workdir / "metrics.jsonl") for name in line)
