"""The denoising objective against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from uwm_jax.diffusion import loss as losses
from uwm_jax.diffusion.schedule import Schedule

SCHEDULE = Schedule()


def make(batch: int = 6):
    rng = np.random.default_rng(0)
    shapes = {"action": (batch, 4, 3), "next_obs": (batch, 2, 5)}
    clean = {m: jnp.asarray(rng.uniform(-1, 1, s), jnp.float32) for m, s in shapes.items()}
    noise = {m: jnp.asarray(rng.normal(size=s), jnp.float32) for m, s in shapes.items()}
    timestep = {m: jnp.asarray(rng.integers(0, 100, batch), jnp.int32) for m in shapes}
    return clean, noise, timestep


def network(noisy, timestep):
    return {m: jnp.sin(2 * x) + 0.01 * timestep[m].reshape(-1, *[1] * (x.ndim - 1)) for m, x in noisy.items()}


PREDICTION = {"action": "v", "next_obs": "epsilon"}


def test_matches_numpy():
    clean, noise, timestep = make()
    errors, output = losses.row_losses(network, SCHEDULE, clean, noise, timestep, PREDICTION)
    abar = SCHEDULE.alphas_cumprod.astype(np.float64)
    expected = {}
    for m in clean:
        x, e = np.float64(clean[m]), np.float64(noise[m])
        a = abar[np.asarray(timestep[m])].reshape(-1, *[1] * (x.ndim - 1))
        prediction = np.sin(2 * (np.sqrt(a) * x + np.sqrt(1 - a) * e))
        prediction += 0.01 * np.asarray(timestep[m]).reshape(a.shape)
        target = np.sqrt(a) * e - np.sqrt(1 - a) * x if m == "action" else e
        expected[m] = np.mean((prediction - target) ** 2)
        np.testing.assert_allclose(output[m], prediction, atol=1e-5)
        np.testing.assert_allclose(errors[m].mean(), expected[m], rtol=1e-5)


def test_there_are_no_more_ranges_than_timesteps():
    clean, noise, _ = make(6)
    schedule = Schedule(num_train_steps=3, num_inference_steps=2)
    timestep = {m: jnp.arange(6) % 3 for m in clean}
    errors, _ = losses.row_losses(network, schedule, clean, noise, timestep, PREDICTION)
    sums = losses.by_timestep(errors, timestep, {m: jnp.ones(6, bool) for m in errors}, 3)
    assert list(sums) == [f"{m}/t{t}-{t}" for m in errors for t in range(3)]
    assert all(count == 2 for _, count in sums.values())
