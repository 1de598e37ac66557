"""Flow matching: the knots and timesteps of the official sampler, the path, and Euler's steps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import reference
from uwm_jax.diffusion.flow import Flow

GOLDEN = "dp_flow_small"


@pytest.mark.parametrize("flow, key", [(Flow(), "policy"), (Flow(100, 5, timeshift=3.0), "policy_shift3")])
def test_walk_of_the_official_sampler(flow, key):
    g = reference.numbers(GOLDEN)
    np.testing.assert_array_equal(flow.knots, g[f"{key}/knots"])
    np.testing.assert_array_equal(flow.timesteps, g[f"{key}/timesteps"])


def test_timesteps_round_down_in_float32():
    """The sixth of these knots is 1/2 in float32; one digit less would make it 49."""
    assert Flow(100, 7, timeshift=2.5).timesteps.tolist() == [100, 93, 86, 76, 65, 50, 29]


@pytest.mark.torch
@pytest.mark.parametrize("timeshift", [0.5, 1.0, 1.7, 3.0])
def test_knots_are_torch_s(timeshift):
    import torch

    for steps in range(1, 60):
        even = torch.linspace(1, 0, steps + 1)
        wanted = timeshift * even / (1 + (timeshift - 1) * even)
        flow = Flow(100, steps, timeshift)
        np.testing.assert_allclose(flow.knots, wanted.numpy(), rtol=0, atol=6e-8)
        np.testing.assert_array_equal(flow.timesteps, torch.floor(100 * wanted[:-1]).int().numpy())


def test_training_draws_of_the_official_code():
    g, flow = reference.numbers(GOLDEN), Flow()
    time = jnp.asarray(g["timestep/continuous"])
    np.testing.assert_array_equal(flow.timestep(time), g["timestep/action"])
    noisy = flow.add_noise(g["action_normalized"], g["noise/action"], time)
    np.testing.assert_allclose(noisy, g["noisy/action"], rtol=0, atol=1e-6)


def test_exact_velocity_leads_back_to_the_data():
    rng, flow = np.random.default_rng(0), Flow(100, 7, timeshift=2.0)
    data, noise = (jnp.asarray(rng.normal(size=(3, 4, 2)).astype(np.float32)) for _ in range(2))
    x, knots = noise, flow.knots
    for now, after in zip(knots[:-1], knots[1:], strict=True):
        np.testing.assert_allclose(x, flow.add_noise(data, noise, jnp.full(3, now)), rtol=0, atol=1e-6)
        x = flow.euler_step(flow.target(data, noise), x, now, after)
    np.testing.assert_allclose(x, data, rtol=0, atol=1e-6)
