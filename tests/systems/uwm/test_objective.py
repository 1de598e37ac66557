"""The objective of the Unified World Model: drawn timesteps, and the treatment of rows without actions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.diffusion import loss as losses
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.systems.uwm import objective

SCHEDULE = Schedule()
PREDICTION = {"action": "v", "next_obs": "epsilon"}


def make(batch: int = 6):
    rng = np.random.default_rng(0)
    shapes = {"action": (batch, 4, 3), "next_obs": (batch, 2, 5)}
    clean = {m: jnp.asarray(rng.uniform(-1, 1, s), jnp.float32) for m, s in shapes.items()}
    noise = {m: jnp.asarray(rng.normal(size=s), jnp.float32) for m, s in shapes.items()}
    timestep = {m: jnp.asarray(rng.integers(0, 100, batch), jnp.int32) for m in shapes}
    return clean, noise, timestep


def network(noisy, timestep):
    return {m: jnp.sin(2 * x) + 0.01 * timestep[m].reshape(-1, *[1] * (x.ndim - 1)) for m, x in noisy.items()}


def call(clean, noise, timestep, mask=None, action_free="kept"):
    """{modality: loss of the batch} and the network's outputs."""
    errors, output = losses.row_losses(network, SCHEDULE, clean, noise, timestep, PREDICTION)
    mask = jnp.ones(len(errors["action"]), bool) if mask is None else mask
    weights = objective.shares(mask, action_free)
    return {m: (weights[m] * errors[m]).sum() for m in errors}, output


def test_rows_without_actions_sit_at_the_last_timestep():
    _, _, timestep = make()
    mask = jnp.array([True, False, True, False, True, True])
    hidden = objective.hide_missing_actions(timestep, mask, SCHEDULE)
    assert hidden["action"][1] == hidden["action"][3] == 99
    np.testing.assert_array_equal(hidden["action"][mask], timestep["action"][mask])
    np.testing.assert_array_equal(hidden["next_obs"], timestep["next_obs"])


def test_dropped_rows_add_nothing_to_the_action_loss():
    clean, noise, timestep = make()
    mask = jnp.array([True, False, True, False, True, True])
    dropped, _ = call(clean, noise, timestep, mask, action_free="dropped")
    keep = np.flatnonzero(mask)
    subset = [{m: x[keep] for m, x in tree.items()} for tree in (clean, noise, timestep)]
    alone, _ = call(*subset, mask[keep])
    np.testing.assert_allclose(dropped["action"], alone["action"], rtol=1e-6)
    kept, _ = call(clean, noise, timestep, mask)
    assert abs(float(kept["action"] - dropped["action"])) > 1e-3
    assert kept["next_obs"] == dropped["next_obs"]

    def action_loss(action, action_free):
        return call(clean | {"action": action}, noise, timestep, mask, action_free=action_free)[0]["action"]

    gradient = jax.grad(action_loss)(clean["action"], "dropped")
    assert not gradient[~mask].any() and gradient[mask].any(axis=(1, 2)).all()
    assert jax.grad(action_loss)(clean["action"], "kept")[~mask].any()


def test_all_rows_dropped_is_zero_and_finite():
    clean, noise, timestep = make()
    parts, _ = call(clean, noise, timestep, jnp.zeros(6, bool), action_free="dropped")
    assert parts["action"] == 0 and np.isfinite(parts["next_obs"])


def test_row_losses_add_up_over_any_partition():
    clean, noise, timestep = make()
    mask = jnp.array([True, False, True, False, True, True])
    errors, _ = losses.row_losses(network, SCHEDULE, clean, noise, timestep, PREDICTION)
    for action_free in ("kept", "dropped"):
        weights = objective.shares(mask, action_free)
        whole, _ = call(clean, noise, timestep, mask, action_free)
        for m in errors:
            parts = [(weights[m][rows] * errors[m][rows]).sum() for rows in (np.array([0, 3]), np.array([1, 2, 4, 5]))]
            np.testing.assert_allclose(sum(parts), whole[m], rtol=1e-6)


@pytest.mark.parametrize(("kind", "share"), [("uniform", 0.25), ("high_noise", 0.625)])
def test_timesteps_cover_the_range_independently(kind, share):
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.vmap(lambda k: objective.draw_timesteps(k, SCHEDULE, kind))(keys)
    action, next_obs = np.asarray(draw["action"]), np.asarray(draw["next_obs"])
    for t in (action, next_obs):
        assert t.min() == 0 and t.max() == 99
    assert abs((action >= 75).mean() - 0.25) < 0.015
    assert abs((next_obs >= 75).mean() - share) < 0.015
    assert abs(np.corrcoef(action, next_obs)[0, 1]) < 0.03


def test_losses_by_timestep_are_sums_and_counts_of_rows():
    clean, noise, timestep = make(64)
    mask = jnp.arange(64) % 3 != 0
    timestep = objective.hide_missing_actions(timestep, mask, SCHEDULE)
    errors, _ = losses.row_losses(network, SCHEDULE, clean, noise, timestep, PREDICTION)
    sums = losses.by_timestep(errors, timestep, objective.drawn(mask), SCHEDULE.num_train_steps)
    assert list(sums)[:4] == ["action/t0-24", "action/t25-49", "action/t50-74", "action/t75-99"]
    for name, (total, count) in sums.items():
        m, span = name.split("/t")
        low, high = map(int, span.split("-"))
        t, drawn = np.asarray(timestep[m]), np.asarray(mask) | (m == "next_obs")
        inside = (t >= low) & (t <= high) & drawn
        assert count == inside.sum() > 0
        np.testing.assert_allclose(total, np.asarray(errors[m])[inside].sum(), rtol=1e-6)
