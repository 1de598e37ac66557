"""A 1-D convolutional U-Net over a sequence, modulated by a condition: the noise predictor of Diffusion Policy.

Chi et al. 2023 (arXiv:2303.04137), "CNN-based Diffusion Policy", as the Unified World Models code has it: residual
blocks of two convolutions along time, of which the first is scaled and shifted, per channel, by a projection of the
condition (FiLM, Perez et al. 2018). Every level but the last halves the length.

Where the parameters lie: kernels of convolutions are (taps, inputs, outputs), of transposed ones (taps, outputs,
inputs). `film/kernel` is (T + F, 2, channels): inputs are [time embedding | global condition], the two are scale and
shift.

Precision: with dtype bfloat16 the convolutions and FiLM's projections run in bfloat16. Normalisation, activations,
residual sums, the time embedding and the output convolution stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops
from uwm_jax.models.activations import constrain
from uwm_jax.models.adaln import StepConditions
from uwm_jax.models.initializers import normal, uniform
from uwm_jax.models.normalization import GroupNorm
from uwm_jax.models.products import dot_general
from uwm_jax.models.resnet import TorchDense
from uwm_jax.models.transformer import sinusoid

Array = jax.Array
FOURIER_STD = 16.0  # of the random frequencies at the start
FINAL_GROUPS = 8  # of the last normalisation, independent of the others


def _conv(inputs: int, features: int, taps: int, dtype: Any, name: str | None = None, stride: int = 1) -> nn.Conv:
    """Convolution along time, padded by taps // 2 on both sides, with torch's default start."""
    start, pad = uniform(1 / math.sqrt(inputs * taps)), taps // 2
    return nn.Conv(features, (taps,), stride, ((pad, pad),), dtype=dtype, kernel_init=start, bias_init=start, name=name)


def _doubling(features: int, dtype: Any) -> nn.ConvTranspose:
    """Transposed convolution of 4 taps and stride 2 that doubles the length, with torch's default start."""
    start, padding = uniform(1 / math.sqrt(features * 4)), ((2, 2),)  # torch calls this padding 1
    return nn.ConvTranspose(
        features, (4,), (2,), padding, dtype=dtype, kernel_init=start, bias_init=start, transpose_kernel=True
    )


class ConvBlock(nn.Module):
    """Convolution along time, GroupNorm (eps 1e-5), Mish: (B, T, C) -> (B, T, features) float32."""

    features: int
    taps: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _conv(x.shape[-1], self.features, self.taps, self.dtype, "conv")(x)
        norm = GroupNorm(self.groups, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name="norm")
        return jax.nn.mish(norm(x))


class Film(nn.Module):
    """The activated condition (rows, K) -> (rows, 2, features) float32: scale, shift."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, activated_cond: Array) -> Array:
        inputs = activated_cond.shape[-1]
        start = uniform(1 / math.sqrt(inputs))
        kernel = self.param("kernel", start, (inputs, 2, self.features))
        bias = self.param("bias", start, (2, self.features))
        cond, kernel, bias = nn.dtypes.promote_dtype(activated_cond, kernel, bias, dtype=self.dtype)
        return (dot_general(cond, kernel, (((1,), (0,)), ((), ()))) + bias).astype(jnp.float32)

    def of_steps(self, conditions: StepConditions) -> Array:
        """(S, B, 2, features) float32 of all rows at all steps."""
        bias: Any = self.get_variable("params", "bias")
        return conditions.combine(self(conditions.activated), bias)


class Residual(nn.Module):
    """Two `ConvBlock`s, the first one's output modulated, and a shortcut, projected where the channels change."""

    features: int
    taps: int
    groups: int
    dtype: Any

    def setup(self) -> None:
        self.film = Film(self.features, self.dtype)

    @nn.compact
    def __call__(self, x: Array, modulation: Array) -> Array:
        """(B, T, C), with what `film` made of the condition (B, 2, features) -> (B, T, features) float32."""
        scale, shift = modulation[:, 0, None], modulation[:, 1, None]
        y = ConvBlock(self.features, self.taps, self.groups, self.dtype, name="block1")(x)
        y = ConvBlock(self.features, self.taps, self.groups, self.dtype, name="block2")(scale * y + shift)
        if x.shape[-1] != self.features:
            x = _conv(x.shape[-1], self.features, 1, self.dtype, "shortcut")(x)
        return constrain(x.astype(jnp.float32) + y, "batch", "length")


class TimeEmbedding(nn.Module):
    """Timesteps (...,) -> (..., features) float32: sinusoids, or learned random Fourier features, then an MLP."""

    features: int
    fourier: bool = False

    @nn.compact
    def __call__(self, timestep: Array) -> Array:
        if self.fourier:
            frequency = self.param("frequency", normal(FOURIER_STD), (self.features // 2,))
            phase = timestep[..., None].astype(jnp.float32) * frequency * (2 * math.pi)
            x = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        else:
            x = sinusoid(timestep, self.features)
        x = jax.nn.mish(TorchDense(4 * self.features, name="fc1")(x))
        return TorchDense(self.features, name="fc2")(x)


class UNet1D(nn.Module):
    """Predicts, from noisy sequences (B, length, dim), what diffusion asks for, in the same shape, float32.

    Fields:
        dim: channels of the sequence, in and out.
        length: its length, a multiple of 2 ** (levels - 1).
        down_dims: channels of each level; multiples of `groups`, and the first one of 8 as well.
        kernel_size: taps of the convolutions, odd.
        groups: of the normalisations; the last one has 8.
        timestep_embed_dim: even, at least 4.
        fourier: learned random Fourier features of the timestep in place of sinusoids.
        dtype: of the large products (module docstring).

    Raises:
        ValueError: (at init) a field that does not fit.
    """

    dim: int
    length: int
    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 3
    groups: int = 8
    timestep_embed_dim: int = 256
    fourier: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self._check()
        dims, dtype = tuple(self.down_dims), self.dtype

        def residual(features: int) -> Residual:
            return Residual(features, self.kernel_size, self.groups, dtype)

        self.timestep_embedding = TimeEmbedding(self.timestep_embed_dim, self.fourier)
        self.down = [[residual(d), residual(d)] for d in dims]
        self.halve = [_conv(d, d, 3, dtype, stride=2) for d in dims[:-1]]
        self.mid = [residual(dims[-1]), residual(dims[-1])]
        # The way up has a level less: what the first level kept is not joined in.
        self.up = [[residual(d), residual(d)] for d in dims[-2::-1]]
        self.double = [_doubling(d, dtype) for d in dims[-2::-1]]
        self.final = ConvBlock(dims[0], self.kernel_size, FINAL_GROUPS, dtype)
        self.output = _conv(dims[0], self.dim, 1, jnp.float32)

    def _check(self) -> None:
        dims = self.down_dims
        if len(dims) < 2 or any(d % self.groups for d in dims) or dims[0] % FINAL_GROUPS:
            raise ValueError(
                f"down_dims must be two or more multiples of groups {self.groups}, the first one of {FINAL_GROUPS} as "
                f"well; found {tuple(dims)}"
            )
        if self.length % 2 ** (len(dims) - 1):
            raise ValueError(
                f"length must be a multiple of {2 ** (len(dims) - 1)}, because {len(dims)} levels halve it "
                f"{len(dims) - 1} times; found {self.length}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, found {self.kernel_size}")
        if self.timestep_embed_dim < 4 or self.timestep_embed_dim % 2:
            raise ValueError(f"timestep_embed_dim must be even and at least 4, found {self.timestep_embed_dim}")

    def __call__(self, global_cond: Array, noisy: Array, timestep: Array) -> Array:
        """One evaluation, each row at its own timestep.

        Args:
            global_cond: (B, F).
            noisy: (B, length, dim).
            timestep: (B,) integers from 0.
        """
        time = constrain(self.timestep_embedding(timestep), "batch")
        cond = jnp.concatenate([time, global_cond.astype(jnp.float32)], axis=-1)
        cond = constrain(jax.nn.mish(cond), "batch")
        return self.predict(noisy, {name: constrain(b.film(cond), "batch") for name, b in self._residuals().items()})

    def modulation(self, global_cond: Array, timestep: Array) -> dict[str, Array]:
        """FiLM modulations of sampler steps (S,) for conditions (B, F): {block: (S, B, 2, channels)}, made at once."""
        time = self.timestep_embedding(timestep)
        conditions = StepConditions.join(global_cond, time, activation=jax.nn.mish, time_first=True)
        return {name: block.film.of_steps(conditions) for name, block in self._residuals().items()}

    def predict(self, noisy: Array, modulation: Mapping[str, Array]) -> Array:
        """`__call__` with one step's slice of `modulation`: {block: (B, 2, channels)}."""
        expected = (noisy.shape[0], self.length, self.dim)
        if noisy.shape != expected:
            raise ValueError(f"noisy must have the shape {expected}, found {noisy.shape}")

        def through(blocks: list[Residual], x: Array) -> Array:
            for block in blocks:
                x = block(x, modulation[str(block.name)])
            return x

        x, kept = noisy.astype(jnp.float32), []
        for level, blocks in enumerate(self.down):
            x = through(blocks, x)
            kept.append(x)
            if level < len(self.halve):
                x = self.halve[level](x)
        x = through(self.mid, x)
        for blocks, double in zip(self.up, self.double, strict=True):
            x = double(through(blocks, jnp.concatenate([x, kept.pop()], axis=-1)))
        return self.output(self.final(x))

    def flops(self, num_features: int) -> float:
        """Operations of the products for one sequence with `num_features` features of the observation."""
        width, taps, length = self.timestep_embed_dim, self.kernel_size, self.length

        def convolution(taps: int, inputs: int, outputs: int) -> float:
            return flops.dense(taps * inputs, outputs, length)

        def pair(inputs: int, features: int) -> float:
            """Two residual blocks."""
            shortcut = convolution(1, inputs, features) if inputs != features else 0.0
            first = convolution(taps, inputs, features) + 2 * flops.dense(width + num_features, 2 * features)
            return shortcut + first + 3 * convolution(taps, features, features)

        total, inputs = 2 * flops.dense(width, 4 * width), self.dim
        for level, features in enumerate(self.down_dims):
            total += pair(inputs, features)
            inputs = features
            if level + 1 < len(self.down_dims):
                length //= 2
                total += convolution(3, features, features)
        total += pair(inputs, inputs)
        for features in self.down_dims[-2::-1]:
            total += pair(2 * inputs, features)
            total += convolution(4, features, features)  # every input is multiplied with 4 taps
            length, inputs = 2 * length, features
        return total + convolution(taps, inputs, inputs) + convolution(1, inputs, self.dim)

    def _residuals(self) -> dict[str, Residual]:
        """The modulated blocks by their names."""
        levels = [*self.down, self.mid, *self.up]
        return {str(block.name): block for blocks in levels for block in blocks}
