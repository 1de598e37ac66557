"""The optimizer of an official run comes along: our steps after it are torch's, and the trainer continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conversion.official_run import OfficialRun, gradients
from tests.golden import reference
from uwm_jax import cli, convert, systems
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import layout
from uwm_jax.training import inference
from uwm_jax.training import state as state_lib
from uwm_jax.training.checkpoint import Checkpoints
from uwm_jax.training.state import TrainState
from uwm_jax.training.step import divide, finish

pytestmark = pytest.mark.torch

LIBERO = "uwm_libero_small"


def command(*arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    return cli.call(convert.main, ["convert", *arguments], convert.define_flags)


def line(pt: Path, workdir: Path, *more: str, optimizer: bool = True, official: Path | None = None) -> list[str]:
    official = official or reference.official_yaml(LIBERO)
    given = f"--input={pt}", f"--official-config={official}", f"--workdir={workdir}", "--no_normalizer"
    return ["from-torch", *(["--optimizer"] if optimizer else []), *given, *more]


def restored(workdir: Path, step: int) -> tuple[System, TrainState]:
    """The system of a workdir, and the training state of a checkpoint as the trainer restores it."""
    system = inference.load_for_inference(workdir, step)[0]
    shapes = jax.eval_shape(lambda: fresh(system, system.init(jax.random.key(0))))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return system, Checkpoints(workdir, read_only=True).restore_state(step, like)[0]


def fresh(system: System, params: Any) -> TrainState:
    return state_lib.create(system.config, params, state_lib.make_optimizer(system.config), system.tree.untrained)


def five_steps(system: System, state: TrainState, run: OfficialRun) -> None:
    """Updates with equal gradients on both sides, up to the fifth; the weights agree after each."""
    entry_of = systems.official(system.config.system).entry_of(system.config)
    trained, _ = divide(system.config, system, state.params)
    optimizer = state_lib.make_optimizer(system.config)
    for step in range(run.finished, 5):
        official = gradients(run.trained, run.shapes, step)
        grads = jax.tree.map(jnp.asarray, layout.from_official(official, trained, entry_of, "gradients"))
        state, _ = finish(system.config, system, optimizer, state, jnp.zeros(()), ({}, {}), grads, {})
        run.steps(1)
        found, wanted = layout.to_official(state.params, entry_of), run.weights()
        assert found.keys() == set(run.trained)
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-6, err_msg=f"{name}, step {step}")


@pytest.mark.slow
def test_five_steps_of_torch_and_of_ours(tmp_path: Path) -> None:
    """Three of torch's, then two of each from a converted checkpoint; and five of each from the same weights."""
    run = OfficialRun(LIBERO)
    run.steps(3)
    assert command(*line(run.save(tmp_path / "models.pt"), tmp_path / "run")) == 0
    system, state = restored(tmp_path / "run", 3)
    assert (int(state.step), int(state.opt_state[0].count)) == (3, 3)
    o = system.config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (1e-3, 0.9, 0.99, 1e-8, 0.1)
    five_steps(system, state, run)

    run.restart()
    entry_of = systems.official(system.config.system).entry_of(system.config)
    weights = {name: value.copy() for name, value in run.weights().items() if name in run.trained}
    params = jax.tree.map(jnp.asarray, layout.from_official(weights, state.params, entry_of, "weights"))
    five_steps(system, fresh(system, params), run)
