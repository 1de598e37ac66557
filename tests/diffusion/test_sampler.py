"""The sampler against a plain loop, for every mode of the table."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.diffusion.roles import Role, generated, given
from uwm_jax.diffusion.sampler import sample
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.systems.uwm.modes import MODES

WHAT_IS_KNOWN = {"policy": (), "video": (), "forward": ("action",), "inverse": ("next_obs",), "joint": ()}
WHAT_IS_MADE = {
    "policy": ("action",),
    "video": ("next_obs",),
    "forward": ("next_obs",),
    "inverse": ("action",),
    "joint": ("action", "next_obs"),
}


def toy(noisy, timestep):
    """A network in which every output depends on both inputs and both timesteps."""
    mixed = jnp.tanh(noisy["action"].mean() + noisy["next_obs"].mean())
    level = 0.01 * timestep["action"] - 0.02 * timestep["next_obs"]
    return {m: jnp.sin(3 * x) * mixed + level for m, x in noisy.items()}


@pytest.mark.parametrize(
    ("spacing", "hide_at", "hidden"), [("leading", "first", 90), ("leading", "train", 99), ("trailing", "first", 99)]
)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_against_a_loop(mode, spacing, hide_at, hidden):
    roles = MODES[mode]
    assert given(roles) == WHAT_IS_KNOWN[mode] and generated(roles) == WHAT_IS_MADE[mode]
    schedule = Schedule(spacing=spacing, hide_at=hide_at)
    rng = np.random.default_rng(0)
    shapes = {"action": (2, 4, 3), "next_obs": (2, 5)}
    noise = {m: jnp.asarray(rng.normal(size=s), jnp.float32) for m, s in shapes.items()}
    known = {m: jnp.asarray(rng.uniform(-1, 1, size=s), jnp.float32) for m, s in shapes.items()}
    prediction, clip = {"action": "epsilon", "next_obs": "sample"}, {"action": 1.0, "next_obs": 2.0}
    calls = []

    def modulation(timestep):
        calls.append(timestep)
        return timestep

    result = sample(modulation, toy, schedule, roles, noise=noise, given=known, prediction=prediction, clip=clip)

    x = {m: known[m] if m in WHAT_IS_KNOWN[mode] else noise[m] for m in shapes}
    states = [dict(x)]
    for i in range(10):
        t = (90 if spacing == "leading" else 99) - 10 * i
        level = {m: t if m in WHAT_IS_MADE[mode] else 0 if m in WHAT_IS_KNOWN[mode] else hidden for m in shapes}
        output = toy(x, level)
        for m in WHAT_IS_MADE[mode]:
            args = (prediction[m], output[m], x[m], jnp.asarray(t), jnp.asarray(t - 10 if t >= 10 else -1))
            x[m] = schedule.ddim_step(*args, clip[m])
        states.append(dict(x))
    assert set(result) == set(WHAT_IS_MADE[mode])
    for m in result:
        np.testing.assert_allclose(result[m], x[m], atol=1e-5)
        assert jnp.abs(result[m]).max() <= clip[m]
    assert len(calls) == 1, "what depends on timesteps alone is computed once, before the scan"
    path = sample(
        modulation, toy, schedule, roles, noise=noise, given=known, prediction=prediction, clip=clip, path=True
    )
    for m in result:
        np.testing.assert_allclose(path[m], jnp.stack([state[m] for state in states]), atol=1e-5)


def test_table_has_a_role_for_every_modality():
    for roles in MODES.values():
        assert set(roles) == {"action", "next_obs"}
        assert Role.GENERATE in roles.values()
