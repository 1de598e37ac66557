"""Flow matching on a straight path between data and noise, and its Euler sampler.

Lipman et al. 2023 (arXiv:2210.02747) with the path of rectified flow (Liu et al. 2023): x_s = x + s (eps - x), whose
velocity eps - x the network is asked for. Time s is in [0, 1): 0 is data, 1 is noise. The network is told the integer
floor(T s), as the official code of Unified World Models does, with the product in float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Flow:
    """The path in training, and how a sampler walks down it.

    Attributes:
      num_train_steps: T, of the network's integer timesteps.
      num_inference_steps: S, network evaluations of a sample.
      timeshift: c > 0; the knots of the walk, evenly spaced from 1 to 0, become c k / (1 + (c - 1) k). More than 1
        makes the steps near the noise smaller.
    """

    num_train_steps: int = 100
    num_inference_steps: int = 10
    timeshift: float = 1.0

    @functools.cached_property
    def knots(self) -> np.ndarray:
        """(S + 1,) float32, from 1 (noise) to 0 (data): the times between which the sampler steps."""
        # Each half is counted from its own end, and operations round to float32 as torch's do: the network's timesteps
        # round down, so that the last digit here can be a whole timestep there.
        steps, index = self.num_inference_steps, np.arange(self.num_inference_steps + 1)
        distance = index * np.float64(np.float32(1) / np.float32(steps))
        even = np.where(index < (steps + 1) // 2, 1 - distance, distance[::-1]).astype(np.float32)
        return np.float32(self.timeshift) * even / (np.float32(1) + np.float32(self.timeshift - 1) * even)

    @property
    def timesteps(self) -> np.ndarray:
        """(S,) int32, descending: what the network is told at each step; the first, T, is not drawn in training."""
        return np.floor(np.float32(self.num_train_steps) * self.knots[:-1]).astype(np.int32)

    def describe(self) -> dict[str, int | float]:
        """How it samples, for the records of evaluations and closed loops."""
        return {"sampler_steps": self.num_inference_steps, "sampler_timeshift": self.timeshift}

    def timestep(self, time: jax.Array) -> jax.Array:
        """Times s (...,) in [0, 1) -> the network's timesteps, int32."""
        return jnp.floor(self.num_train_steps * time.astype(jnp.float32)).astype(jnp.int32)

    def add_noise(self, x: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """x_s for clean x (B, ...), noise of its shape and times (B,)."""
        return x + time.reshape(time.shape + (1,) * (x.ndim - time.ndim)) * (noise - x)

    def target(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        """The velocity d x_s / d s, which is the same at all times."""
        return noise - x

    def euler_step(self, velocity: jax.Array, x: jax.Array, time: jax.Array, next_time: jax.Array) -> jax.Array:
        """x at `next_time` of x at `time`, () each; nothing is clipped."""
        return x + (next_time - time) * velocity
