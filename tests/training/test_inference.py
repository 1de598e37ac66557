"""The choice of a checkpoint's parameters, and the messages about them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.errors import UserError
from uwm_jax.synthetic import synthetic_system
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, make_assets
from uwm_jax.training.inference import load_for_inference, parameters_used
from uwm_jax.training.state import create, make_optimizer
from uwm_jax.training.workdir import save_params_only, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_tiny_config):
    """A run of 4 steps with an average that is 1 more than the parameters, and these parameters."""
    config = make_tiny_config()
    config.optimizer.ema_decay, config.optimizer.ema_warmup = 0.99, "none"
    workdir = tmp_path_factory.mktemp("inference") / "run"
    system, frozen = synthetic_system(config, 10)
    params = jax.jit(system.init)(jax.random.key(1))
    write_config(workdir, config)
    state = create(config, params, make_optimizer(config))
    state = dataclasses.replace(state, step=jnp.int32(4), ema_params=jax.tree.map(lambda x: x + 1, params))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state, {}, frozen, make_assets(config, system.spec))
    checkpoints.close()
    return workdir, params


@pytest.mark.parametrize(("parameters", "more"), [(None, 1), ("average", 1), ("raw", 0)])
def test_raw_and_averaged_parameters(run, parameters, more, capfd):
    workdir, params = run
    _, found, _, step = load_for_inference(workdir, parameters=parameters)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + more), found, params)
    told, used = capfd.readouterr().err, parameters_used(workdir, step, parameters)
    if more:
        assert used["parameters"] == "average" and used["share_of_start"] == pytest.approx(0.99**4)
        assert "warning: 96.1% of the averaged parameters of step 4 are still the random start" in told
        assert "--parameters=raw" in told
    else:
        assert used == {"parameters": "raw", "share_of_start": None} and "warning" not in told


def test_an_average_that_is_not_there(run, tmp_path, make_tiny_config):
    system, frozen = synthetic_system(make_tiny_config(), 10)
    save_params_only(tmp_path / "converted", make_tiny_config(), system.spec, run[1], frozen)
    assert parameters_used(tmp_path / "converted", 0)["parameters"] == "raw"
    with pytest.raises(UserError, match="--parameters=average: .*0 holds no average of the parameters"):
        load_for_inference(tmp_path / "converted", parameters="average")


@pytest.mark.parametrize(("parameters", "more", "share"), [("average", 1, 0.99**4), ("raw", 0, None)])
def test_to_torch_writes_and_records_what_was_asked_for(run, tmp_path, parameters, more, share):
    workdir, params = run
    to_torch(workdir, tmp_path / "out.safetensors", parameters=parameters)
    described = json.loads((tmp_path / "out.json").read_text())
    assert described["parameters"] == parameters and described["share_of_start"] == pytest.approx(share)
    registers = load_file(tmp_path / "out.safetensors")["noise_pred_net.registers"]
    np.testing.assert_allclose(registers, np.asarray(params["noise_pred_net"]["registers"]) + more, rtol=1e-6)
