"""Evaluation in tiny form, and its intervals against closed forms."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest

from uwm_jax import cli, evaluate, report
from uwm_jax.config import source
from uwm_jax.data.loader import Loader
from uwm_jax.evaluate import collect, interval, measure
from uwm_jax.train import train
from uwm_jax.training.checkpoint import load_for_inference


def test_interval_is_clustered():
    rng = np.random.default_rng(0)
    means = rng.normal(size=200)
    values = np.repeat(means, 5)  # windows of an episode are copies of each other
    clusters = np.repeat(np.arange(200), 5)
    found = interval(values, clusters)
    half = 1.96 * means.std() / np.sqrt(200)
    assert found["n"] == 1000
    np.testing.assert_allclose(found["mean"], means.mean())
    np.testing.assert_allclose([found["lo"], found["hi"]], [means.mean() - half, means.mean() + half], atol=0.02)
    one = interval(np.array([1.0, 3.0]), np.array([7, 7]))
    assert one == {"mean": 2.0, "lo": 2.0, "hi": 2.0, "n": 2}


def test_measures_against_known_errors():
    shape = (4, 1, 2, 3, 3, 3)
    truth = {"action": np.zeros((4, 5, 2)), "next_obs_latent": np.zeros(shape), "next_obs": np.full(shape, 0.5)}
    windows = {"episode": np.arange(4), "current": np.full(shape, 0.6), **truth}
    for mode in ("policy", "inverse", "joint"):
        windows[f"{mode}/action"] = np.full((4, 5, 2), 0.3)
    for mode in ("video", "forward", "joint"):
        windows[f"{mode}/next_obs_latent"] = np.full(shape, 2.0)
        windows[f"{mode}/next_obs"] = np.full(shape, 0.4)
    metrics = measure(windows)
    for mode in ("policy", "inverse", "joint"):
        assert metrics[f"{mode}/action_mse"]["mean"] == pytest.approx(0.09)
    for mode in ("video", "forward", "joint"):
        assert metrics[f"{mode}/latent_mse"]["mean"] == pytest.approx(4.0)
        assert metrics[f"{mode}/psnr"]["mean"] == pytest.approx(20.0)
    assert metrics["baseline/copied_frame/psnr"]["mean"] == pytest.approx(20.0)
    assert "policy/latent_mse" not in metrics and "video/action_mse" not in metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_tiny_config):
    """Two steps on a mixture, of which only the source with actions is evaluated."""
    config = make_tiny_config()
    config.total_steps = 2
    config.data.sources.robot, config.data.sources.video = source(), source(use_actions=False)
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(config, workdir)
    return workdir


@pytest.mark.slow
def test_the_command_writes_metrics_pictures_and_report(trained):
    arguments = ["evaluate", f"--workdir={trained}"]
    assert cli.call(evaluate.main, arguments, evaluate.define_flags) == 0
    metrics = json.loads((trained / "eval" / "2" / "metrics.json").read_text())
    assert set(metrics["joint/psnr"]) == {"mean", "lo", "hi", "n"} and metrics["joint/psnr"]["n"] == 6
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and 'src="http' not in page
    assert "data.sources.video.use_actions" in page
    for mode in ("policy", "video", "forward", "inverse", "joint"):
        assert f"<th>{mode}</th>" in page and html.escape(report.formula(mode)) in page


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_size(trained):
    system, params, frozen, _ = load_for_inference(trained)
    held_out = Loader(system.config.data, batch_size=1, seed=0).held_out(6)
    whole, parts = (collect(system, params, frozen, held_out, batch_size=size) for size in (6, 4))
    assert set(whole) == set(parts) and len(whole["episode"]) == 6
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=2e-4, err_msg=name)
