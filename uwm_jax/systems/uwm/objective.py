"""The training objective of the Unified World Model: both modalities at independent timesteps (paper, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from uwm_jax.diffusion.roles import Role
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.systems.base import share_equally
from uwm_jax.systems.uwm.modes import ACTION_FREE_MODE, MODALITIES, MODES

# Modalities that rows without actions do not show.
_HIDDEN_WITHOUT_ACTIONS = {m: MODES[ACTION_FREE_MODE][m] is Role.HIDDEN for m in MODALITIES}


def draw_timesteps(key: jax.Array, schedule: Schedule, next_obs: str = "uniform") -> dict[str, jax.Array]:
    """Independent timesteps of one row, {modality: () int32 in [0, T)} (paper, algorithm 1).

    `next_obs="high_noise"` draws half of the next_obs timesteps from the noisiest quarter.
    """
    action_key, next_obs_key, branch_key = jax.random.split(key, 3)
    total = schedule.num_train_steps
    t_next = jax.random.randint(next_obs_key, (), 0, total)
    if next_obs == "high_noise":
        noisy = jax.random.randint(next_obs_key, (), total - max(total // 4, 1), total)
        t_next = jnp.where(jax.random.bernoulli(branch_key), noisy, t_next)
    return {"action": jax.random.randint(action_key, (), 0, total), "next_obs": t_next}


def hide_missing_actions(
    timestep: Mapping[str, jax.Array], action_mask: jax.Array, schedule: Schedule
) -> dict[str, jax.Array]:
    """Rows without actions take the timesteps of `ACTION_FREE_MODE`: what it hides sits at T - 1.

    Args:
      timestep: {modality: (B,)}.
      action_mask: (B,) bool, False where no action was recorded.
    """
    return {
        m: jnp.where(action_mask, timestep[m], schedule.train_hidden_timestep) if hidden else timestep[m]
        for m, hidden in _HIDDEN_WITHOUT_ACTIONS.items()
    }


def drawn(action_mask: jax.Array) -> dict[str, jax.Array]:
    """{modality: (B,) bool}: the rows whose timestep is not set by `hide_missing_actions`."""
    return {m: action_mask if hidden else jnp.ones_like(action_mask) for m, hidden in _HIDDEN_WITHOUT_ACTIONS.items()}


def shares(action_mask: jax.Array, action_free: str = "kept") -> dict[str, jax.Array]:
    """{modality: (B,) float32}: each row's share, so that sums over rows are the losses of the whole batch.

    Any partition of the rows then adds up to the same loss, on any devices.

    Args:
      action_mask: (B,) bool.
      action_free: `dropped` (the action loss is the mean over rows that have actions; 0 if none has) or `kept`
        (official): rows without actions predict from what they were given at T - 1, the noise. That is their target
        with epsilon; with `sample` and `v` their target is the centre of the actions' range, which they would teach.
    """
    every = jnp.full(action_mask.shape, 1 / action_mask.shape[0])
    with_action, drops = share_equally(action_mask), action_free == "dropped"
    return {m: with_action if hidden and drops else every for m, hidden in _HIDDEN_WITHOUT_ACTIONS.items()}
