"""The command in tiny form: a row for every way of sampling. tests/test_rollout.py lets the policy act by each."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from tests.systems.small import small_config
from uwm_jax import cli, compare_samplers, systems
from uwm_jax.compare_samplers import parse_ways
from uwm_jax.config import source
from uwm_jax.data.robot import RobotActions
from uwm_jax.errors import UserError
from uwm_jax.evaluation import closed_loop
from uwm_jax.synthetic import synthetic_system
from uwm_jax.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_tiny_config):
    config = make_tiny_config()
    config.total_steps = 2
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(config, workdir)
    return workdir


@pytest.mark.slow
def test_ways_of_sampling_are_compared(trained, capsys):
    arguments = ["compare_samplers", f"--workdir={trained}", "--sampler=leading,trailing", "--steps=2,1"]
    assert cli.call(compare_samplers.main, arguments, compare_samplers.define_flags) == 0
    found = json.loads((trained / "eval" / "2" / "few_steps.json").read_text())
    rows, about = found["rows"], found["about"]
    assert about["windows"] == 6 and about["own_data"]
    assert about["command"][2:] == ["uwm_jax.compare_samplers", *arguments[1:]]
    ways = [(row["sampler"], row["steps"]) for row in rows]
    assert [row["first_timestep"] for row in rows] == [row["hidden_timestep"] for row in rows] == [50, 0, 99, 99]
    assert ways == [("leading", 2), ("leading", 1), ("trailing", 2), ("trailing", 1)]
    assert len({row["metrics"]["policy/action_mse"]["mean"] for row in rows}) == 4
    assert all(row["seconds_per_sample"] > 0 and row["metrics"]["joint/psnr"]["n"] == 6 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if line.split()[:2] == ["sampler", "steps"]]
    assert "policy/action_mse" in head and "video/psnr" in head
    assert [line.split()[:2] for line in lines if "[too few]" in line and "trailing" in line] == [
        ["trailing", "2"],
        ["trailing", "1"],
    ]


@pytest.mark.slow
def test_flags_without_an_effect_are_refused(trained, capsys):
    for flags, message in (
        (["--env=pusht"], "--sampler or --steps is required"),
        (["--steps=2", "--episodes=3"], "--episodes requires --env"),
        (["--steps=2", "--execute=4"], "--execute requires --env"),
    ):
        arguments = ["compare_samplers", f"--workdir={trained}", *flags]
        assert cli.call(compare_samplers.main, arguments, compare_samplers.define_flags) == 2
        assert message in capsys.readouterr().err


def test_a_mixture_of_conventions_acts_by_its_first_robot(tiny_config, monkeypatch):
    system, _ = synthetic_system(tiny_config, 10)
    width = system.spec.action_dim
    first, other = (
        RobotActions.from_json({"parts": [{"columns": "action", "transform": name, "width": width}], "states": {}})
        for name in ("identity", "gripper_inverted")
    )
    spec = dataclasses.replace(system.spec, robots={"a": first, "b": other})
    tiny_config.data.sources = ConfigDict({name: source() for name in "ab"})
    mixed = systems.make(tiny_config, spec, system.codec)
    opened = []
    monkeypatch.setattr(closed_loop, "open_envs", lambda *args: contextlib.nullcontext(opened.append(args)))
    with compare_samplers.open_acting("pusht", mixed, 2, 1) as acting:
        assert acting.seeds == range(100_000, 100_002) and len(opened) == 1
    with pytest.raises(UserError, match="execute=99: expected 1 to"):
        with compare_samplers.open_acting("pusht", mixed, 2, 99):
            pass


def test_ways_of_sampling_that_do_not_exist_are_refused(tiny_config):
    system, _ = synthetic_system(tiny_config, 10)
    ways = parse_ways(system, "trailing", "4, 2,4")
    assert [w.schedule.timesteps.tolist() for w in ways] == [[99, 74, 49, 24], [99, 49]]
    assert len(parse_ways(system, None, "3")) == len(parse_ways(system, "leading", None)) == 1
    for spacings, steps, message in (
        ("uniform", None, "--sampler: expected leading or trailing, or both with a comma; found 'uniform'"),
        (None, "0", "--steps: expected numbers from 1 to 100, such as 10,4,2; found '0'"),
        (None, "101", "found '101'"),
        (None, "4,two", "found 'two'"),
        (None, "4,", "found ''"),
    ):
        with pytest.raises(UserError, match=message):
            parse_ways(system, spacings, steps)


@pytest.mark.parametrize(
    ("variant", "spacings", "steps", "message"),
    [
        (
            "gr1",
            None,
            "4",
            "--steps=4: this workdir is a gr1 run, whose samples do not depend on config.diffusion.num_inf",
        ),
        (
            "dp_flow",
            "leading,trailing",
            None,
            "--sampler=leading,trailing: this workdir is a dp run, whose samples do not",
        ),
    ],
)
def test_a_flag_that_does_not_change_a_systems_samples_is_refused(variant, spacings, steps, message):
    system, _ = synthetic_system(small_config(variant), 2)
    with pytest.raises(UserError, match=f"^{message}"):
        parse_ways(system, spacings, steps)


def test_flow_matching_has_steps_without_a_spacing():
    system, _ = synthetic_system(small_config("dp_flow"), 2)
    assert [way.describe_sampling()["sampler_steps"] for way in parse_ways(system, None, "4,2")] == [4, 2]
