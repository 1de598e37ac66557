"""Schedules, the forward process and DDIM against diffusers and against reference values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.diffusion.schedule import Schedule

# Made by the official model's scheduler (float32).
ABAR = {0: 0.999368727, 10: 0.966716647, 50: 0.47826457, 90: 0.0195443742, 99: 2.42854071e-07}


def u(n: int, k: int) -> np.ndarray:
    x = 43758.5453 * np.sin(12.9898 * np.arange(1, n + 1, dtype=np.float64) + 78.233 * (k + 1))
    return x - np.floor(x) - 0.5


def test_alphas_cumprod_reference_values():
    abar = Schedule().alphas_cumprod
    assert abar.dtype == np.float32
    np.testing.assert_allclose([abar[t] for t in ABAR], list(ABAR.values()), rtol=1e-6)


def test_timesteps():
    assert Schedule().timesteps.tolist() == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert Schedule().sample_hidden_timestep == 90 and Schedule().train_hidden_timestep == 99
    trailing = Schedule(spacing="trailing")
    assert trailing.timesteps.tolist() == [99, 89, 79, 69, 59, 49, 39, 29, 19, 9]
    assert trailing.sample_hidden_timestep == Schedule(hide_at="train").sample_hidden_timestep == 99
    with pytest.raises(ValueError, match="unknown hide_at 'nowhere'"):
        _ = Schedule(hide_at="nowhere").sample_hidden_timestep
    for schedule in (Schedule(), trailing, Schedule(num_inference_steps=1), Schedule(num_inference_steps=3)):
        assert schedule.previous_timesteps.tolist() == schedule.timesteps.tolist()[1:] + [-1]


def test_ddim_reference_trace():
    schedule = Schedule()
    x = jnp.asarray(3 * u(4, 1008), jnp.float32)
    expected = {
        90: [0.073855, 0.593642, -0.630176, -0.667195],
        50: [-0.089653, 0.39158, -0.269608, -0.274457],
        10: [-0.069373, -0.000628, -0.085916, -0.086425],
        0: [-0.064202, -0.000581, -0.079536, -0.080009],
    }
    for t, previous in zip(schedule.timesteps, schedule.previous_timesteps, strict=True):
        eps = jnp.sin(3 * x + 0.01 * t)
        x = schedule.ddim_step("epsilon", eps, x, jnp.asarray(t), jnp.asarray(previous), 1.0)
        if int(t) in expected:
            np.testing.assert_allclose(x, expected[int(t)], atol=1.5e-6)


def test_add_noise_reference():
    x, noise = (jnp.asarray(2 * u(6, k).reshape(2, 3), jnp.float32) for k in (1009, 1010))
    noisy = Schedule().add_noise(x, noise, jnp.array([3, 99]))
    np.testing.assert_allclose(noisy, [[0.6812, 0.4486, -0.0371], [-0.1511, 0.3190, 0.6416]], atol=6e-5)


def test_target_and_step_agree():
    """The step from any timestep to clean data returns x_0 when the network's output is its target."""
    schedule = Schedule()
    rng = np.random.default_rng(0)
    x, noise = (jnp.asarray(rng.uniform(-1, 1, (5, 4, 3)), jnp.float32) for _ in range(2))
    timestep = jnp.array([0, 20, 50, 70, 90])
    noisy = schedule.add_noise(x, noise, timestep)
    for prediction in ("epsilon", "sample", "v"):
        output = schedule.target(prediction, x, noise, timestep)
        clean = schedule.ddim_step(prediction, output, noisy, timestep, jnp.full((5,), -1), 0.0)
        np.testing.assert_allclose(clean, x, atol=2e-5)
        landed = schedule.ddim_step(prediction, output, noisy, timestep, timestep // 2, 0.0)
        np.testing.assert_allclose(landed, schedule.add_noise(x, noise, timestep // 2), atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_matches_diffusers(beta_schedule, spacing, prediction, clip):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDIMScheduler(
        num_train_timesteps=100,
        beta_schedule=beta_schedule,
        timestep_spacing=spacing,
        prediction_type={"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}[prediction],
        clip_sample=bool(clip),
    )
    reference.set_timesteps(10)
    schedule = Schedule(beta_schedule=beta_schedule, spacing=spacing)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=2e-6)
    assert schedule.timesteps.tolist() == reference.timesteps.tolist()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    for t, previous in zip(schedule.timesteps, schedule.previous_timesteps, strict=True):
        output = rng.normal(size=x.shape).astype(np.float32)
        ours = schedule.ddim_step(prediction, jnp.asarray(output), jnp.asarray(x), t, previous, clip)
        theirs = reference.step(torch.tensor(output), int(t), torch.tensor(x)).prev_sample.numpy()
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()))
        x = theirs
