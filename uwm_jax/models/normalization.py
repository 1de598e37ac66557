"""Group normalisation of channels-last images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models.activations import on_one_cpu

Array = jax.Array


class GroupNorm(nn.GroupNorm):
    """Flax's, with the sums of images (N, H, W, C) taken in an order that suits CPUs.

    XLA's CPU compiler runs one reduction over rows, columns and the channels of a group on one thread, value by
    value. Over rows alone it is one of vectors that threads share, and leaves little to add.
    """

    @nn.compact
    def __call__(self, x: Array, *, mask: Any = None) -> Array:
        if x.ndim != 4 or mask is not None or self.use_fast_variance or not on_one_cpu():
            return super().__call__(x, mask=mask)
        n, rows, columns, channels = x.shape
        groups = self.num_groups
        scale = self.param("scale", self.scale_init, (channels,), self.param_dtype)
        bias = self.param("bias", self.bias_init, (channels,), self.param_dtype)

        def mean(x: Array) -> Array:
            sums = x.sum(axis=1).sum(axis=1).reshape(n, groups, channels // groups).sum(axis=-1)
            means = sums / (rows * columns * channels // groups)
            return jnp.repeat(means, channels // groups, axis=-1)[:, None, None]

        centred = x.astype(jnp.float32)
        centred = centred - mean(centred)
        scale = jax.lax.rsqrt(mean(jnp.square(centred)) + self.epsilon) * scale
        return (centred * scale + bias).astype(self.dtype)
