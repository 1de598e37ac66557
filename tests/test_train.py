"""The real training command in tiny form: what it leaves behind, how it continues, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.train import train
from uwm_jax.training.checkpoint import Checkpoints, load_for_inference
from uwm_jax.training.log import NotFinite


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A run of four steps, and its config."""
    return tmp_path_factory.mktemp("run") / "workdir"


def test_a_run_from_start_to_end(finished, tiny_config, capsys):
    tiny_config.eval.every = 4
    train(tiny_config, finished)
    lines = metrics_of(finished)
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == [1, 2, 3, 4]
    expected = {"step", "loss", "loss/action", "loss/next_obs", "grad_norm", "learning_rate", "samples_per_second"}
    for x in steps:
        assert expected | {"data_wait_fraction"} == set(x)
        np.testing.assert_allclose(x["loss"], x["loss/action"] + x["loss/next_obs"], rtol=1e-6)
    # The outputs start at zero, so epsilon prediction starts at the variance of the noise.
    assert 1.5 < steps[0]["loss"] < 2.5
    assert {"eval/loss/action", "eval/loss/next_obs"} <= set(lines[-1])
    assert config_lib.read(finished) == tiny_config
    assert list((finished / "tensorboard").iterdir())
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [2, 4]
    items = {p.name for p in (finished / "checkpoints" / "4").iterdir() if p.is_dir()}
    assert items == {"params", "ema_params", "train_state", "data_iter", "assets", "codec"}
    output = capsys.readouterr().out
    assert "step 4/4" in output and "ETA" in output and "6 episodes" in output


def test_the_checkpoint_describes_itself(finished, tiny_config):
    checkpoints = Checkpoints(finished)
    assets = checkpoints.assets(4)
    checkpoints.close()
    assert assets["config"]["model"]["depth"] == 2
    assert assets["data_facts"]["action_dim"] == 10 and assets["data_facts"]["cameras"] == {"wrist": [16, 16]}
    assert assets["dataset"]["format"] == "uwm_jax/chunks" and assets["code_version"]
    system, params, frozen, step = load_for_inference(finished)
    assert step == 4 and frozen["components"].shape == (1, 192, 4)
    assert system.facts.normalizer.entries["action"][0].shape == (10,)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    with pytest.raises(UserError, match=r"--step=3.*\[2, 4\]"):
        load_for_inference(finished, 3)


def test_continuing_equals_never_having_stopped(finished, tiny_config, tmp_path):
    """From the checkpoint of step 2 on, with more loader threads: the same losses to the last bit."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "4")
    tiny_config.data.num_threads = 3
    train(tiny_config, again)
    before, after = ([x for x in metrics_of(d) if "loss" in x] for d in (finished, again))
    assert [x["step"] for x in after] == [1, 2, 3, 4]
    for x, y in zip(before[2:], after[2:], strict=True):
        for name in ("loss", "loss/action", "loss/next_obs", "grad_norm"):
            assert x[name] == y[name]
    params = [load_for_inference(d)[1] for d in (finished, again)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_changed_config_is_refused_by_field(finished, tiny_config):
    tiny_config.eval.every = 4
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate is 0.5.*started with 0.001"):
        train(tiny_config, finished)
    assert config_lib.read(finished).optimizer.learning_rate == 1e-3


def test_not_finite_names_step_and_metric(tiny_config, tmp_path):
    tiny_config.optimizer.learning_rate = 1e30
    tiny_config.total_steps = 10
    with pytest.raises(NotFinite, match=r"step \d: (loss|grad_norm)"):
        train(tiny_config, tmp_path / "run")
    steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    for x in metrics_of(tmp_path / "run"):
        assert np.isfinite(x["loss"])
    assert all(s <= metrics_of(tmp_path / "run")[-1]["step"] for s in steps)


def test_batches_that_do_not_divide_and_missing_data(tiny_config, tmp_path):
    tiny_config.mesh.data = 3
    with pytest.raises(UserError, match=r"config.mesh.data=3 does not fit the \d"):
        train(tiny_config, tmp_path / "run")
    tiny_config.mesh.data = -1
    tiny_config.data.path = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing"):
        train(tiny_config, tmp_path / "run")


def test_the_codec_must_fit_the_crop(tiny_config, tmp_path):
    tiny_config.data.crop = tiny_config.data.resize = (24, 24)
    with pytest.raises(UserError, match=r"pca.npz was fitted on 16x16 images.*\(24, 24\)"):
        train(tiny_config, tmp_path / "run")


@pytest.mark.slow
def test_the_command_needs_neither_tensorflow_nor_torch(tiny_config, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import json\nfrom uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(tiny_config)!r}, 'test')\n"
    )
    program = (
        "import sys, runpy\n"
        "sys.modules['tensorflow'] = sys.modules['torch'] = None\n"
        "sys.argv = ['train', *sys.argv[1:]]\n"
        "runpy.run_module('uwm_jax.train', run_name='__main__')\n"
    )
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.total_steps=2"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    assert "done: 2 steps" in result.stdout
    assert [x["step"] for x in metrics_of(tmp_path / "run")] == [1, 2]
