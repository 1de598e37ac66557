"""Checkpoints that others may be writing, that do not fit, or that were never finished."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from uwm_jax.benchmark_step import make_up_codec, make_up_system
from uwm_jax.errors import UserError
from uwm_jax.training.checkpoint import Checkpoints, latest_step, load_for_inference, save_params_only
from uwm_jax.training.state import create, make_optimizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory, make_tiny_config):
    """A workdir with parameters and assets alone, and these parameters."""
    config = make_tiny_config()
    config.model.codec.name = "pca"
    workdir = tmp_path_factory.mktemp("checkpoint") / "run"
    system, frozen = make_up_system(config, 10)
    params = jax.jit(system.init)(jax.random.key(1))
    save_params_only(workdir, config, system.facts, params, frozen)
    return workdir, system, params, frozen


def test_parameters_and_codec_come_back(converted):
    workdir, _, params, frozen = converted
    _, found, found_frozen, step = load_for_inference(workdir)
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, found, params)
    jax.tree.map(np.testing.assert_array_equal, found_frozen, frozen)


def test_reading_leaves_a_save_in_progress_alone(converted):
    workdir = converted[0]
    unfinished = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    try:
        assert latest_step(workdir) == 0
        assert load_for_inference(workdir)[3] == 0
        assert unfinished.is_dir()
    finally:
        unfinished.rmdir()


def test_a_workdir_without_checkpoints_stays_untouched(converted, tmp_path):
    (tmp_path / "config.json").write_text((converted[0] / "config.json").read_text())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_for_inference(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert latest_step(tmp_path) is None and latest_step(tmp_path / "none") is None


def test_a_converted_checkpoint_cannot_be_continued(converted, make_tiny_config):
    workdir, system, params, _ = converted
    config = make_tiny_config()
    state = jax.eval_shape(lambda p: create(config, p, make_optimizer(config)), params)
    checkpoints = Checkpoints(workdir, read_only=True)
    with pytest.raises(UserError, match="without a training state"):
        checkpoints.restore_state(0, state)
    checkpoints.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("model.num_registers", "3"), r"pos_embed is \(1, 7, 32\) in the checkpoint, but \(1, 8, 32\)"),
        (("model.num_registers", "0"), r"pos_embed is \(1, 7, 32\) in the checkpoint, but \(1, 5, 32\)"),
        (("model.depth", "3"), r"blocks/.* is \(2, .* but \(3, "),
        (("data.cameras", "front"), r"config.data.cameras is \('front',\).*\('wrist',\)"),
        (("data.low_dim", "gripper"), r"config.data.low_dim is \('gripper',\).*\('state',\)"),
    ],
)
def test_overrides_that_do_not_fit_the_checkpoint_are_named(converted, override, message):
    with pytest.raises(UserError, match=message):
        load_for_inference(converted[0], overrides=[override])


def test_made_up_pca_is_orthonormal(make_tiny_config):
    _, frozen = make_up_codec(make_tiny_config())
    gram = np.einsum("vpk,vpl->vkl", frozen["components"], frozen["components"])
    np.testing.assert_allclose(gram, np.eye(gram.shape[-1])[None], atol=1e-5)
