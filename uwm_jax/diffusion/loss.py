"""The training objective: both modalities noised at independent timesteps, one network evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.systems.uwm.modes import ACTION_FREE_MODE, MODALITIES, MODES, TRAINING_MODE, Role

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


def row_losses(
    network: Callable[[dict[str, jax.Array], Arrays], dict[str, jax.Array]],
    schedule: Schedule,
    clean: Arrays,
    noise: Arrays,
    timestep: Arrays,
    prediction: Mapping[str, str],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Mean squared error of each row and modality (paper, equation 2), from one evaluation of the network.

    Args:
      network: ({modality: noisy}, {modality: (B,) timesteps}) -> {modality: output, float32}.
      clean, noise: {modality: (B, ...)}.
      timestep: {modality: (B,)}, with `hide_missing_actions` applied.
      prediction: {modality: epsilon | sample | v}.

    Returns:
      {modality: (B,) float32} and the network's outputs.
    """
    noisy = {m: schedule.add_noise(clean[m], noise[m], timestep[m]) for m in MODALITIES}
    output = network(noisy, timestep)
    errors = {}
    for m in MODALITIES:
        if MODES[TRAINING_MODE][m] is Role.GENERATE:
            error = output[m] - schedule.target(prediction[m], clean[m], noise[m], timestep[m])
            errors[m] = jnp.square(error).reshape(error.shape[0], -1).mean(axis=1)
    return errors, output


def row_weights(action_mask: jax.Array, action_free: str = "kept") -> dict[str, jax.Array]:
    """{modality: (B,) float32}: what each row counts, so that sums over rows are the losses of the whole batch.

    Any partition of the rows then adds up to the same loss, whatever the parts are computed on.

    Args:
      action_mask: (B,) bool.
      action_free: `dropped` (the action loss is the mean over rows that have actions; 0 if none has) or `kept`
        (official): rows without actions predict from what they were given at T - 1, the noise. That is their target
        with epsilon; with `sample` and `v` their target is the centre of the actions' range, which they would teach.
    """
    every = jnp.full(action_mask.shape, 1 / action_mask.shape[0])
    with_action = action_mask / jnp.maximum(action_mask.sum(), 1)
    hidden = {m: MODES[ACTION_FREE_MODE][m] is Role.HIDDEN for m in MODALITIES}
    return {m: with_action if hidden[m] and action_free == "dropped" else every for m in MODALITIES}


def by_timestep(
    errors: Arrays, timestep: Arrays, action_mask: jax.Array, schedule: Schedule, buckets: int = 4
) -> dict[str, jax.Array]:
    """{"action/t0-24": (2,) [sum of row losses, number of rows], ...}: equal ranges of timesteps of each modality.

    Rows without actions, whose action timestep is not drawn, are not counted for the action. There are no more ranges
    than timesteps.
    """
    buckets = min(buckets, schedule.num_train_steps)
    edges = [i * schedule.num_train_steps // buckets for i in range(buckets + 1)]
    sums = {}
    for m, error in errors.items():
        drawn = action_mask if MODES[ACTION_FREE_MODE][m] is Role.HIDDEN else jnp.ones_like(action_mask)
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (drawn & (timestep[m] >= low) & (timestep[m] < high)).astype(jnp.float32)
            sums[f"{m}/t{low}-{high - 1}"] = jnp.stack([(inside * error).sum(), inside.sum()])
    return sums
