"""A system that is as unlike a world model as possible, defined here alone: the trainer and the commands serve it."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from ml_collections import ConfigDict

from uwm_jax import cli, evaluate, report, systems, train
from uwm_jax import config as config_lib
from uwm_jax.data.run_data import RunData
from uwm_jax.parallel import sharding
from uwm_jax.systems.base import Flops, Losses, System, SystemType, TreeInfo, share_equally
from uwm_jax.training import build

TREE = TreeInfo(gradient_groups=(("", "all"),), mesh_rules=(("w", ("fsdp", "tensor")), ("*", ())))


class Regression(System):
    """Predicts the last step of the low-dimensional observation from the first by a matrix; no images, no actions."""

    uses, acting, tree = {}, "", TREE

    def init(self, key):
        return {"w": 0.1 * jax.random.normal(key, (self.width, self.width)), "b": jnp.zeros(self.width)}

    @property
    def width(self):
        return sum(self.spec.low_dim.values())

    def encode(self, frozen, batch, key=None):
        return {"x": jnp.concatenate([batch[f"obs/{k}"] for k in sorted(self.spec.low_dim)], axis=-1)}

    def draws(self, key, rows):
        return {}

    def shares(self, batch, key):
        return {"x": share_equally(jnp.ones(batch["row"].shape, bool))}

    def losses(self, params, encoded, draws, *, train=False):
        x = encoded["x"]
        error = x[:, 0] @ params["w"] + params["b"] - x[:, -1]
        return Losses({"x": jnp.square(error).mean(axis=-1)}, {}, {})

    def noise(self, key, rows, use):
        return {}

    def sample(self, params, encoded, use, noise, *, trace=False):
        raise KeyError(use)

    def flops(self):
        return Flops({"matrix": 2.0 * self.width**2})


def add_fields(c: ConfigDict) -> None:
    c.model = ConfigDict({"dtype": "float32"})
    c.loss = ConfigDict({"weights": ConfigDict({"x": 1.0})})
    c.data.cameras, c.data.action, c.data.window.action, c.data.window.next_obs = (), (), (), ()


REGRESSION = SystemType(
    name="regression",
    title="Linear regression",
    add_fields=add_fields,
    check=lambda config: None,
    make=Regression,
    tree=lambda config: TREE,
    uses={},
    acting="",
)


@pytest.fixture
def config(tiny_dataset, monkeypatch):
    monkeypatch.setattr(systems, "_TYPES", dict(systems._TYPES))
    systems.register(REGRESSION)
    c = config_lib.base("regression")
    c.total_steps, c.batch_size, c.log_every, c.eval.every, c.checkpoint.every = 4, 4, 1, 2, 2
    c.eval.num_windows = 6
    c.data.path, c.data.low_dim, c.data.val_ratio = str(tiny_dataset), ("state",), 0.3
    c.data.num_streams, c.data.num_threads = 8, 1
    c.optimizer.learning_rate = 0.1
    return c


def test_the_trainer_and_the_commands_serve_it(config, tmp_path, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train.train(config, straight)
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["loss/x"] < lines[0]["loss/x"]
    assert {"eval/loss/x", "grad_norm/all"} <= lines[1].keys()

    half = config.copy_and_resolve_references()
    half.total_steps = 2
    train.train(half, stopped)
    train.train(config, stopped)  # continues
    again = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]

    assert cli.call(evaluate.main, ["evaluate", f"--workdir={straight}"], evaluate.define_flags) == 0
    metrics = json.loads((straight / "eval" / "4" / "metrics.json").read_text())
    assert metrics.keys() == {"loss/x"}
    np.testing.assert_allclose(metrics["loss/x"]["mean"], lines[-1]["eval/loss/x"], rtol=1e-6)
    assert cli.call(report.main, ["report", str(straight)], report.define_flags) == 0
    assert "Linear regression" in (straight / "report.html").read_text()


def test_its_table_cuts_its_parameters(config):
    with contextlib.closing(RunData(config.data, seed=0)) as data:
        spec = dataclasses.replace(data.spec, low_dim={"state": 8})
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    program = build.build(config, spec, None, mesh)
    cut = program.shardings.params
    assert tuple(cut["w"].spec) == ("fsdp", "tensor") and tuple(cut["b"].spec) == ()
    assert "fsdp" in sharding.table(mesh, program.rules, program.shapes, program.shardings)
