"""Noise schedules, the forward process and DDIM, as diffusers' DDIMScheduler computes them.

One difference: a step lands on the next timestep that is visited. diffusers subtracts T // n, which is the same
except for trailing spacing with a number of steps n that does not divide T.

Conventions: T = `num_train_steps`; timestep t in [0, T); `alphas_cumprod` is float32 of shape (T,);
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (DDPM, Ho et al. 2020, equation 4).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A discrete noise schedule and how DDIM walks down it.

    Attributes:
      num_train_steps: T.
      num_inference_steps: network evaluations of a sample.
      beta_schedule: `squaredcos_cap_v2`, `linear` or `scaled_linear`.
      spacing: `leading` (T//n multiples: 90, 80, ..., 0 of 100) or `trailing` (99, 89, ..., 9), Lin et
        al. 2024, table 2.
      hide_at: the timestep of a hidden modality at sampling: `first` of the walk, or `train`, T - 1 as in training.
    """

    num_train_steps: int = 100
    num_inference_steps: int = 10
    beta_schedule: str = "squaredcos_cap_v2"
    spacing: str = "leading"
    hide_at: str = "first"

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float32, the cumulative products of 1 - beta taken in float32."""
        steps = self.num_train_steps
        if self.beta_schedule == "squaredcos_cap_v2":

            def bar(s: float) -> float:
                return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

            betas = np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])
        elif self.beta_schedule == "linear":
            betas = np.linspace(1e-4, 0.02, steps)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(math.sqrt(1e-4), math.sqrt(0.02), steps) ** 2
        else:
            raise ValueError(f"unknown beta_schedule {self.beta_schedule!r}")
        return np.cumprod(np.float32(1.0) - betas.astype(np.float32), dtype=np.float32)

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """(num_inference_steps,) int32, descending: where the sampler evaluates the network."""
        total, count = self.num_train_steps, self.num_inference_steps
        if self.spacing == "leading":
            steps = np.arange(count) * (total // count)
        elif self.spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / count)[:count])[::-1] - 1
        else:
            raise ValueError(f"unknown spacing {self.spacing!r}")
        return steps[::-1].astype(np.int32)

    def describe(self) -> dict[str, str | int]:
        """How it samples, for the records of evaluations and closed loops."""
        return {
            "sampler_spacing": self.spacing,
            "sampler_steps": self.num_inference_steps,
            "sampler_first_timestep": int(self.timesteps[0]),
            "sampler_hidden_timestep": self.sample_hidden_timestep,
        }

    @property
    def previous_timesteps(self) -> np.ndarray:
        """(num_inference_steps,) int32, where each step lands: the next one's timestep, at last -1, clean data."""
        return np.append(self.timesteps[1:], np.int32(-1))

    @property
    def train_hidden_timestep(self) -> int:
        """The timestep of a hidden modality in training, T - 1."""
        return self.num_train_steps - 1

    @property
    def sample_hidden_timestep(self) -> int:
        """The timestep of a hidden modality at sampling, by `hide_at`."""
        if self.hide_at == "first":
            return int(self.timesteps[0])
        if self.hide_at == "train":
            return self.train_hidden_timestep
        raise ValueError(f"unknown hide_at {self.hide_at!r}")

    def signal_and_noise(self, timestep: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """sqrt(abar_t) and sqrt(1 - abar_t) for (B,) timesteps (-1: clean), shaped (B, 1, ...) of rank `ndim`."""
        padded = jnp.asarray(np.append(self.alphas_cumprod, np.float32(1.0)))  # index -1 is the clean end
        abar = padded[timestep]
        abar = abar.reshape(abar.shape + (1,) * (ndim - abar.ndim))
        return jnp.sqrt(abar), jnp.sqrt(1 - abar)

    def add_noise(self, x: jax.Array, noise: jax.Array, timestep: jax.Array) -> jax.Array:
        """x_t for clean x (B, ...), noise of its shape and integer timesteps (B,)."""
        signal, sigma = self.signal_and_noise(timestep, x.ndim)
        return signal * x + sigma * noise

    def target(self, prediction: str, x: jax.Array, noise: jax.Array, timestep: jax.Array) -> jax.Array:
        """The network's target: `epsilon`, `sample` (x_0) or `v` (Salimans and Ho 2022, appendix D)."""
        if prediction == "epsilon":
            return noise
        if prediction == "sample":
            return x
        if prediction == "v":
            signal, sigma = self.signal_and_noise(timestep, x.ndim)
            return signal * noise - sigma * x
        raise ValueError(f"unknown prediction {prediction!r}")

    def clean_and_noise(
        self, prediction: str, output: jax.Array, x: jax.Array, timestep: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The (x_0, eps) that x (B, ...) at `timestep`, () or (B,), consists of, if the network's `output` is right."""
        signal, sigma = self.signal_and_noise(timestep, x.ndim)
        if prediction == "epsilon":
            return (x - sigma * output) / signal, output
        if prediction == "sample":
            return output, (x - signal * output) / sigma
        if prediction == "v":
            return signal * x - sigma * output, signal * output + sigma * x
        raise ValueError(f"unknown prediction {prediction!r}")

    def ddim_step(
        self,
        prediction: str,
        output: jax.Array,
        x: jax.Array,
        timestep: jax.Array,
        previous: jax.Array,
        clip: float,
    ) -> jax.Array:
        """One deterministic DDIM step (Song et al. 2021, equation 12 with eta = 0) from `timestep` to `previous`.

        Args:
          prediction: what `output` is, as in `target`.
          output: network output, the shape of x (B, ...), float32.
          x: the noisy data at `timestep`.
          timestep, previous: () or (B,) integers; previous -1 means clean data.
          clip: bound of the predicted clean data, 0 for none. The noise estimate is the one before
            clipping, as diffusers does by default.
        """
        return self.land(*self.clean_and_noise(prediction, output, x, timestep), previous, clip)

    def land(self, clean: jax.Array, eps: jax.Array, previous: jax.Array, clip: float) -> jax.Array:
        """The second half of `ddim_step`, from estimates of the clean data, not clipped yet, and of the noise."""
        if clip:
            clean = jnp.clip(clean, -clip, clip)
        next_signal, next_sigma = self.signal_and_noise(previous, clean.ndim)
        return next_signal * clean + next_sigma * eps
