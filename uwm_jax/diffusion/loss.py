"""The training objective: both modalities noised at independent timesteps, one network evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from uwm_jax.diffusion.modes import ACTION_FREE_MODE, MODALITIES, MODES, TRAINING_MODE, Role
from uwm_jax.diffusion.schedule import Schedule

Arrays = Mapping[str, jax.Array]


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


def hide_missing_actions(timestep: Arrays, action_mask: jax.Array, schedule: Schedule) -> dict[str, jax.Array]:
    """Rows without actions take the timesteps of `ACTION_FREE_MODE`: what it hides sits at T - 1.

    Args:
      timestep: {modality: (B,)}.
      action_mask: (B,) bool, False where no action was recorded.
    """
    return {
        m: jnp.where(action_mask, timestep[m], schedule.train_hidden_timestep)
        if MODES[ACTION_FREE_MODE][m] is Role.HIDDEN
        else timestep[m]
        for m in MODALITIES
    }


def diffusion_loss(
    network: Callable[[dict[str, jax.Array], Arrays], dict[str, jax.Array]],
    schedule: Schedule,
    clean: Arrays,
    noise: Arrays,
    timestep: Arrays,
    *,
    weights: Arrays,
    prediction: Mapping[str, str],
    action_mask: jax.Array,
    action_free: str = "kept",
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Weighted sum of the modalities' mean squared errors (paper, equation 2).

    Args:
      network: ({modality: noisy}, {modality: (B,) timesteps}) -> {modality: output, float32}.
      clean, noise: {modality: (B, ...)}.
      timestep: {modality: (B,)}, with `hide_missing_actions` applied.
      weights: {modality: () array}.
      prediction: {modality: epsilon | sample | v}.
      action_mask: (B,) bool.
      action_free: `kept` (official: rows without actions still predict what they were given at T - 1) or
        `dropped` (the action loss is the mean over rows that have actions; 0 if none has).

    Returns:
      The weighted loss, {modality: unweighted loss} and the network's outputs.
    """
    noisy = {m: schedule.add_noise(clean[m], noise[m], timestep[m]) for m in MODALITIES}
    output = network(noisy, timestep)
    losses = {}
    for m in MODALITIES:
        if MODES[TRAINING_MODE][m] is not Role.GENERATE:
            continue
        error = jnp.square(output[m] - schedule.target(prediction[m], clean[m], noise[m], timestep[m]))
        hidden = MODES[ACTION_FREE_MODE][m] is Role.HIDDEN
        if hidden and action_free == "dropped":
            rows = error.reshape(error.shape[0], -1).mean(axis=1)
            losses[m] = jnp.where(action_mask, rows, 0.0).sum() / jnp.maximum(action_mask.sum(), 1)
        else:
            losses[m] = error.mean()
    return sum((weights[m] * losses[m] for m in losses), jnp.zeros(())), losses, output
