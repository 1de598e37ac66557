"""Runs that start from another run: what they begin with, what they say, and that they continue without it."""

from __future__ import annotations

import contextlib
import io
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.data import rlds_source
from tests.golden import reference
from uwm_jax import config as config_lib
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.errors import UserError
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.inference import load_for_inference

GOLDEN = "uwm_libero_small"


@pytest.fixture(scope="module")
def new_dataset(tmp_path_factory):
    """Other episodes than those of `tiny_dataset`, so other statistics and another PCA codec."""
    from data_prep.conversion.training_layout import reshard

    root = tmp_path_factory.mktemp("new_dataset")
    rlds_source.make(root / "source", [24, 20, 22], seed=7)
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, val_ratio=0.3, workers=1)
    return root / "out"


@pytest.fixture(scope="module")
def origin(tmp_path_factory, make_tiny_config):
    """The workdir of a run of two steps that keeps an average of its parameters."""
    config = make_tiny_config()
    config.total_steps = 2
    workdir = tmp_path_factory.mktemp("origin") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, workdir)
    return workdir


@pytest.fixture
def config(tiny_config, new_dataset, origin):
    """One step on other data whose learning rate is still 0, so that it ends with what it began with."""
    tiny_config.data.path = str(new_dataset)
    tiny_config.init_from = str(origin)
    tiny_config.total_steps = tiny_config.optimizer.warmup_steps = 1
    return tiny_config


def read(workdir, step, item):
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.assets(step) if item == "assets" else checkpoints.restore_arrays(step, item)
    finally:
        checkpoints.close()


@pytest.mark.slow
def test_a_run_starts_from_the_averaged_parameters_with_the_rest_fresh(config, origin, tmp_path, capsys):
    train(config, tmp_path / "run")
    average, last = (read(origin, 2, item) for item in ("ema_params", "params"))
    started = read(tmp_path / "run", 1, "params")
    jax.tree.map(np.testing.assert_array_equal, started, average)
    assert not np.array_equal(average["noise_pred_net"]["pos_embed"], last["noise_pred_net"]["pos_embed"])
    # The average of the new run begins there too (exact up to the rounding of one update).
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), read(tmp_path / "run", 1, "ema_params"), average
    )
    counts = [x for x in jax.tree.leaves(read(tmp_path / "run", 1, "train_state")) if x.dtype == np.int32]
    assert counts and all(int(x) == 1 for x in counts), "step and optimizer count from the start"

    old, new = (read(workdir, step, "assets")["data_spec"] for workdir, step in ((origin, 2), (tmp_path / "run", 1)))
    assert new["normalizer"] == old["normalizer"]
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "run", 1, "codec"), read(origin, 2, "codec"))
    past = read(tmp_path / "run", 1, "assets")
    assert past["leak"] is None and past["latent_sizes"].keys() == {config.data.path.split("/")[-1]}
    assert [x["val_ratio"] for x in past["learned_from"]] == [0.3, 0.3], "the origin's data, and its own"
    assert config_lib.read(tmp_path / "run").init_from == f"{origin}@2"
    said = capsys.readouterr().out
    for part in (
        "starting from ema_params of step 2",
        "normaliser: action, state as in the origin",
        "skipped: nothing",
    ):
        assert part in said

    # Where a run continues, its origin is history: it may be gone.
    config.total_steps = 2
    hidden = origin.with_name("hidden")
    origin.rename(hidden)
    try:
        train(config, tmp_path / "run")
    finally:
        hidden.rename(origin)
    said = capsys.readouterr().out
    assert "continuing from step 1" in said and "starting from" not in said
    assert read(tmp_path / "run", 2, "assets")["data_spec"]["normalizer"] == old["normalizer"]


def test_an_origin_that_is_gone_is_a_clear_error_before_anything_is_written(tiny_config, tmp_path):
    tiny_config.init_from = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="config.init_from=.*nothing.*Expected DIR or DIR@STEP"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_action_width_starts_with_fresh_layers_and_its_own_normaliser(config, origin, tmp_path, capsys):
    config.data.action = (("action", "identity"),)  # 7 numbers instead of 10
    with pytest.raises(UserError, match=r"action_encoder/fc1/kernel: \(10, 128\) in the origin, \(7, 128\) here") as e:
        train(config, tmp_path / "run")
    flag = re.search(r"--config.init_from_skip='(.*)'", str(e.value)).group(1)
    config_lib.apply_overrides(config, [("init_from_skip", flag)])
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "normaliser: state as in the origin; action from this run's data (minmax)" in said
    assert "skipped: noise_pred_net/action_decoder/fc2/bias" in said and "start fresh" in said
    old, new = (read(workdir, step, "assets")["data_spec"] for workdir, step in ((origin, 2), (tmp_path / "run", 1)))
    assert new["normalizer"]["state"] == old["normalizer"]["state"]
    assert len(new["normalizer"]["action"]["scale"]) == new["action_dim"] == 7
    started, average = read(tmp_path / "run", 1, "params"), read(origin, 2, "ema_params")
    for name in ("pos_embed", "registers"):
        np.testing.assert_array_equal(started["noise_pred_net"][name], average["noise_pred_net"][name])


@pytest.mark.slow
def test_a_converted_official_checkpoint_is_an_origin(new_dataset, tmp_path, capsys):
    """Official LIBERO weights: no training state, no normaliser, a VAE of their own."""
    save_file(reference.weights(GOLDEN), tmp_path / "official.safetensors")
    official = tmp_path / "official"
    from_torch(tmp_path / "official.safetensors", reference.official_yaml(GOLDEN), official, no_normalizer=True)

    config = config_lib.read(official)
    config.init_from = str(official)
    config.total_steps = config.optimizer.warmup_steps = 1
    config.batch_size, config.data.num_streams, config.data.num_threads = 2, 8, 1
    config.data.path, config.data.val_ratio = str(new_dataset), 0.3
    config.data.cameras, config.data.action = ("exterior", "wrist"), (("action", "identity"),)
    config.model.codec.vae = "not/read"
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "normaliser: action as in the origin (action: none, raw values)" in said
    assert "codec: the origin's vae" in said
    assert "note: config.data.cameras is ['exterior', 'wrist']" in said

    _, expected, vae, _ = load_for_inference(official)
    system, params, copied, _ = load_for_inference(tmp_path / "run")
    assert not system.spec.normalizer.entries
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    jax.tree.map(np.testing.assert_array_equal, copied, vae)
    shutil.rmtree(official)
    config.total_steps = 2
    train(config, tmp_path / "run")
    assert "continuing from step 1" in capsys.readouterr().out

    config.branch_from = f"{tmp_path / 'run'}@1"  # whose VAE lies in its workdir
    train(config, tmp_path / "branch")
    assert "branching from step 1" in capsys.readouterr().out
    for found, expected in zip(*(load_for_inference(tmp_path / w)[1:3] for w in ("branch", "run")), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert config_lib.read(tmp_path / "branch").init_from == config_lib.read(tmp_path / "run").init_from != ""
