"""The program that evaluates all modes, on a network of one line, against numpy."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.codecs import PCACodec
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import RunError, UserError
from uwm_jax.evaluation.evaluator import Evaluator, rows_at_a_time
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.sharding import load_rules
from uwm_jax.systems.uwm.modes import MODES, USES
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import codec_store


class OneLine:
    """A network that looks at both modalities and at a parameter; it predicts clean data."""

    def apply(self, variables, *args, method=None):
        if method == "encode_obs":
            return args[0].mean(axis=(1, 2, 3, 4, 5))
        if method == "modulation":
            cond, timestep = args
            return jnp.broadcast_to(cond, (len(timestep["action"]), *cond.shape))
        if method is None:
            cond, noisy, _ = args
        else:
            noisy, cond = args
        seen = {m: x.reshape(len(x), -1).mean(axis=1) for m, x in noisy.items()}
        level = variables["params"]["slope"] * seen["action"] + 0.3 * seen["next_obs"] + cond
        return {m: 0.1 * x + level.reshape(-1, *[1] * (x.ndim - 1)) for m, x in noisy.items()}, {}


PARAMS = {"slope": jnp.float32(2.0)}


@pytest.fixture(scope="module")
def setup(make_tiny_config):
    """A config, its data and a system around `OneLine`."""
    config = make_tiny_config()
    config.eval.num_windows = 6  # few enough to come to the host, all of them
    config.diffusion.prediction.action = config.diffusion.prediction.next_obs = "sample"
    config.diffusion.clip.next_obs = 20.0
    data = RunData(config.data, seed=0)
    arrays = codec_store.in_dataset(config, data).arrays
    system = UWM(config, data.spec, PCACodec.from_arrays(arrays))
    system.network = OneLine()
    return config, data, system, {name: jnp.asarray(x) for name, x in arrays.items()}


def evaluate(setup, batch_size=4, params=PARAMS):
    config, data, system, frozen = setup
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size
    mesh = mesh_lib.make_mesh(config, jax.devices()[:1])
    held_out = data.held_out(config.eval.num_windows)
    evaluation = Evaluator(system, data, held_out, mesh, load_rules("", "uwm", TREE.mesh_rules), batch_size)
    params, frozen = mesh_lib.place((params, frozen), mesh_lib.replicated(mesh))
    evaluation.compile(params, frozen)
    return evaluation, *evaluation.run(params, frozen)


@pytest.fixture(scope="module")
def evaluated(setup):
    """{metric: interval} and the windows of an evaluation, which fill one batch and a half."""
    return evaluate(setup)[1:]


@pytest.fixture(scope="module")
def windows(setup):
    """All held-out windows as one batch."""
    held_out = setup[1].held_out(6)
    return held_out.batch(0, len(held_out))


def mean(metrics, name):
    return metrics[name]["mean"]


def test_metrics_are_those_of_what_is_shown(setup, evaluated):
    """Six windows are all shown, so that every metric of frames and actions can be taken again."""
    metrics, shown = evaluated
    _, data, _, _ = setup
    np.testing.assert_array_equal(shown["episode"], data.held_out(6).episodes)
    truth, current = shown["next_obs"], shown["current"][:, :, -1:]
    changed = np.abs(truth - current) > 0.05
    frames = {mode: shown[f"{mode}/next_obs"] for mode in MODES if "next_obs" in USES[mode].makes}
    frames["control/forward_shuffled"] = shown["forward_shuffled/next_obs"]
    frames["baseline/copied_frame"] = np.broadcast_to(current, truth.shape)
    frames["baseline/mean_image"] = np.broadcast_to(shown["mean_image"], truth.shape)
    assert set(frames) >= {"video", "forward", "joint"}
    for name, made in frames.items():
        assert made.min() >= 0 and made.max() <= 1
        square = (made.astype(np.float64) - truth) ** 2
        per_window = square.reshape(6, -1).mean(axis=1)
        np.testing.assert_allclose(mean(metrics, f"{name}/pixel_mse"), per_window.mean(), rtol=1e-4)
        np.testing.assert_allclose(mean(metrics, f"{name}/psnr"), -10 * np.log10(per_window).mean(), rtol=1e-4)
        of_changed = np.mean([s[c].mean() for s, c in zip(square, changed, strict=True)])
        np.testing.assert_allclose(mean(metrics, f"{name}/changed_mse"), of_changed, rtol=1e-4)
    for mode in MODES:
        assert (f"{mode}/action" in shown) == ("action" in USES[mode].makes) == (f"{mode}/action_mse" in metrics)
        if f"{mode}/action" in shown:
            error = np.mean((shown[f"{mode}/action"] - shown["action"]) ** 2)
            np.testing.assert_allclose(mean(metrics, f"{mode}/action_mse"), error, rtol=1e-4)
    assert all(set(value) == {"mean", "lo", "hi", "n", "episodes"} and value["n"] == 6 for value in metrics.values())


def test_baselines_against_the_data(setup, evaluated, windows):
    metrics, shown = evaluated
    config, data, system, frozen = setup
    action, last = windows["action"].astype(np.float64), windows["last_action"].astype(np.float64)
    way = np.arange(1, 5)[:, None] / 4
    guesses = {
        "mean_action": data.mean_action(),
        "last_action": last[:, None],
        "linear_interpolation": last[:, None] * (1 - way) + action[:, -1:] * way,
    }
    for name, guess in guesses.items():
        np.testing.assert_allclose(
            mean(metrics, f"baseline/{name}/action_mse"), np.mean((guess - action) ** 2), rtol=1e-4
        )

    training = data.training_windows(256)
    frames = training.batch(0, len(training))["next_obs/wrist"] / 255.0  # neither resized nor cropped: 16 pixels
    np.testing.assert_allclose(shown["mean_image"][0, 0], frames.mean(axis=(0, 1)), atol=1e-5)
    truth = windows["next_obs/wrist"][:, None] / 255.0
    latents = system.codec.encode(frozen, jnp.asarray(truth, jnp.float32), None)
    decoded = np.clip(system.codec.decode(frozen, latents), 0, 1)
    np.testing.assert_allclose(mean(metrics, "baseline/codec/pixel_mse"), np.mean((decoded - truth) ** 2), atol=1e-9)
    copied = system.codec.encode(frozen, jnp.asarray(shown["current"][:, :, [-1, -1]]), None)
    np.testing.assert_allclose(
        mean(metrics, "baseline/copied_frame/latent_mse"), np.mean((copied - latents) ** 2), rtol=1e-4
    )
    assert "baseline/codec/latent_mse" not in metrics


def test_the_control_differs_by_its_actions_alone(setup, evaluated, windows):
    metrics, shown = evaluated
    _, data, system, frozen = setup
    np.testing.assert_array_equal(shown["shuffled_action"], windows["action"][data.held_out(6).shuffled])
    noise = system.noise(jax.random.key(0), jnp.arange(6), "policy")
    for name, action in (("forward", windows["action"]), ("forward_shuffled", shown["shuffled_action"])):
        made = system.sample(PARAMS, system.encode(frozen, {**windows, "action": action}), "forward", noise)
        frames = np.clip(system.frames(frozen, made), 0, 1)
        np.testing.assert_allclose(shown[f"{name}/next_obs"], frames, atol=1e-5)
    assert np.abs(shown["forward/next_obs"] - shown["forward_shuffled/next_obs"]).max() > 1e-3
    difference = mean(metrics, "control/forward_shuffled/latent_mse") - mean(metrics, "forward/latent_mse")
    np.testing.assert_allclose(mean(metrics, "paired/forward_vs_shuffled/latent_mse"), difference, rtol=1e-3)


def test_shuffle_gap_in_closed_form(setup, evaluated, windows):
    """`OneLine` predicts 0.1 x + slope mean(a) + 0.3 mean(x) + mean(o), of which actions change one term."""
    metrics, shown = evaluated
    _, _, system, frozen = setup
    latent = np.asarray(system.codec.encode(frozen, jnp.asarray(shown["next_obs"]), None), np.float64).reshape(6, -1)
    noise = np.asarray(system.noise(jax.random.key(0), jnp.arange(6), "policy")["next_obs"]).reshape(6, -1)
    noisy = np.sqrt(0.0195443742) * latent + np.sqrt(1 - 0.0195443742) * noise
    rest = 0.1 * noisy + (0.3 * noisy.mean(axis=1) + shown["current"].reshape(6, -1).mean(axis=1))[:, None] - latent
    error = [
        ((rest + 2.0 * a.reshape(6, -1).mean(axis=1)[:, None]) ** 2).mean(axis=1)
        for a in (windows["action"], shown["shuffled_action"])
    ]
    gap = metrics["control/shuffle_gap"]
    np.testing.assert_allclose(gap["mean"], (error[1] - error[0]).mean(), rtol=1e-3)
    assert abs(gap["mean"]) > 1e-3, "shuffled actions must change something for this to mean something"


@pytest.mark.usefixtures("optimised")  # else two branches of equal numbers round apart
def test_a_model_that_ignores_actions_has_no_gap(setup):
    _, metrics, shown = evaluate(setup, params={"slope": jnp.float32(0.0)})
    assert mean(metrics, "control/shuffle_gap") == 0.0
    np.testing.assert_array_equal(shown["forward/next_obs"], shown["forward_shuffled/next_obs"])


def test_the_joint_sample_is_shown_on_its_way(setup, evaluated):
    _, shown = evaluated
    _, _, system, frozen = setup
    noise = system.noise(jax.random.key(0), jnp.arange(6), "policy")
    picked, view = shown["denoise/windows"], int(shown["denoise/view"])
    np.testing.assert_array_equal(picked, [0, 2, 5])
    assert shown["denoise/action"].shape[:2] == (11, 6) and shown["denoise/next_obs"].shape == (11, 3, 16, 16, 3)
    np.testing.assert_allclose(shown["denoise/action"][0], noise["action"], atol=1e-6)
    np.testing.assert_allclose(shown["denoise/action"][-1], shown["joint/action"], atol=1e-6)
    start = np.clip(system.frames(frozen, {"next_obs_latent": noise["next_obs"]}), 0, 1)
    np.testing.assert_allclose(shown["denoise/next_obs"][0], start[picked, view, -1], atol=1e-5)
    np.testing.assert_allclose(shown["denoise/next_obs"][-1], shown["joint/next_obs"][picked, view, -1], atol=1e-5)


def test_neither_batches_nor_what_was_evaluated_before_change_a_metric(setup, evaluated):
    metrics, shown = evaluated
    evaluation, whole, _ = evaluate(setup, batch_size=6)
    assert set(whole) == set(metrics)
    for name, value in metrics.items():
        np.testing.assert_allclose(mean(whole, name), value["mean"], rtol=1e-4, atol=1e-6, err_msg=name)
        assert (whole[name]["n"], whole[name]["episodes"]) == (value["n"], value["episodes"])
    again, _ = evaluation.run(PARAMS, setup[3])
    assert again == whole


def test_another_sampler_is_measured_on_the_same_windows(setup):
    config, _, system, frozen = setup
    evaluation, metrics, _ = evaluate(setup)
    same = evaluation.run_uses(system, PARAMS, frozen)
    names = {name for name in metrics if name.split("/")[0] in MODES}
    assert names <= set(same)
    for name in names:
        np.testing.assert_allclose(mean(same, name), mean(metrics, name), rtol=1e-5)
    config = config.copy_and_resolve_references()
    config.diffusion.num_inference_steps = 1
    one_step = UWM(config, system.spec, system.codec)
    one_step.network = system.network
    assert mean(evaluation.run_uses(one_step, PARAMS, frozen), "joint/action_mse") != mean(metrics, "joint/action_mse")


def test_windows_are_evenly_spread_where_there_are_many(setup):
    config, data, system, frozen = setup
    mesh = mesh_lib.make_mesh(config, jax.devices()[:1])
    held_out = data.held_out(19)
    assert len(held_out) > 12
    evaluation = Evaluator(system, data, held_out, mesh, load_rules("", "uwm", TREE.mesh_rules), 4)
    params, frozen = mesh_lib.place((PARAMS, frozen), mesh_lib.replicated(mesh))
    evaluation.compile(params, frozen)
    metrics, shown = evaluation.run(params, frozen)
    picked = np.round(np.linspace(0, len(held_out) - 1, 8)).astype(int)
    np.testing.assert_array_equal(shown["episode"], held_out.episodes[picked])
    every = held_out.batch(0, len(held_out))
    np.testing.assert_array_equal(shown["action"], every["action"][picked])
    np.testing.assert_allclose(shown["next_obs"][:, 0], every["next_obs/wrist"][picked] / 255.0, atol=1e-6)
    assert metrics["policy/action_mse"]["n"] == len(held_out)


def test_a_batch_takes_seconds_and_divides_over_the_devices():
    def mesh(data, fsdp, tensor):  # of which only the sizes matter
        return SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor})

    assert [rows_at_a_time(mesh(1, 1, 2), n) for n in (6, 64, 256)] == [6, 64, 64]
    assert [rows_at_a_time(mesh(3, 2, 1), n) for n in (1, 6, 7, 256)] == [6, 6, 12, 66]
    assert rows_at_a_time(mesh(256, 1, 1), 256) == 256


def test_what_cannot_be_evaluated_is_explained(setup):
    with pytest.raises(RunError, match=r"(mse|psnr) is nan in held-out window 0 and 5 more"):
        evaluate(setup, params={"slope": jnp.float32(np.nan)})
    config, data, system, _ = setup
    spec = dataclasses.replace(data.spec, action_dim=1)
    config = config.copy_and_resolve_references()
    config.eval.action_plane = ("wrist", 0.0, 1.0, 0.0, 1.0)
    with pytest.raises(UserError, match=r"config.eval.action_plane=.*at least two numbers"):
        narrow = UWM(config, spec, system.codec)
        rules = load_rules("", "uwm", TREE.mesh_rules)
        Evaluator(narrow, data, data.held_out(6), mesh_lib.make_mesh(config), rules, 4)


class ThreeWindows(tuple):
    episodes, bad = np.arange(3), {}


def test_windows_are_those_of_the_episodes_whatever_training_reads(setup):
    """A run from cached latents is compared with one from frames."""
    abouts = []
    for latents in ("", f" latents {'0' * 64}"):
        sources = {"robot": SimpleNamespace(identity=f"{'a' * 64} (success){latents}")}
        evaluator = SimpleNamespace(
            held_out=ThreeWindows(),
            _data=SimpleNamespace(sources=sources),
            system=SimpleNamespace(describe_sampling=dict),
        )
        abouts.append(Evaluator.about(evaluator))
    assert abouts[0] == abouts[1] and abouts[0]["datasets"] == {"robot": f"{'a' * 64} (success)"}
