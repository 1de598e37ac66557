"""The denoising objective of several modalities, each noised at its own timestep, from one network evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from uwm_jax.diffusion.schedule import Schedule

Arrays = Mapping[str, jax.Array]


def row_losses(
    network: Callable[[dict[str, jax.Array], Arrays], dict[str, jax.Array]],
    schedule: Schedule,
    clean: Arrays,
    noise: Arrays,
    timestep: Arrays,
    prediction: Mapping[str, str],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Mean squared error of each row and modality, from one evaluation of the network.

    Args:
      network: ({modality: noisy}, {modality: (B,) timesteps}) -> {modality: output, float32}.
      clean, noise: {modality: (B, ...)}.
      timestep: {modality: (B,)}.
      prediction: {modality: epsilon | sample | v}.

    Returns:
      {modality: (B,) float32} and the network's outputs.
    """
    noisy = {m: schedule.add_noise(clean[m], noise[m], timestep[m]) for m in clean}
    output = network(noisy, timestep)
    errors = {}
    for m in clean:
        error = output[m] - schedule.target(prediction[m], clean[m], noise[m], timestep[m])
        errors[m] = row_mean(jnp.square(error))
    return errors, output


def row_mean(x: jax.Array) -> jax.Array:
    """(B, ...) -> (B,), the mean over all other axes."""
    return x.reshape(x.shape[0], -1).mean(axis=1)


def by_timestep(
    errors: Arrays, timestep: Arrays, drawn: Arrays, num_train_steps: int, buckets: int = 4
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{"action/t0-24": (sum of row losses, number of rows), ...}: equal ranges of timesteps of each modality.

    There are no more ranges than timesteps.

    Args:
      errors, timestep: {modality: (B,)}.
      drawn: {modality: (B,) bool}, the rows that count: those whose timestep was drawn.
    """
    buckets = min(buckets, num_train_steps)
    edges = [i * num_train_steps // buckets for i in range(buckets + 1)]
    sums = {}
    for m, error in errors.items():
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (drawn[m] & (timestep[m] >= low) & (timestep[m] < high)).astype(jnp.float32)
            sums[f"{m}/t{low}-{high - 1}"] = (inside * error).sum(), inside.sum()
    return sums
