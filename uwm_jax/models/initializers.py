"""Initialisers that draw flat and reshape: the same numbers as drawing in shape, compiled many times faster.

XLA on CPUs takes seconds for each random array of four axes, because the counters behind the bits are computed
axis by axis; of one axis it takes a tenth of a second.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def normal(std: float) -> Any:
    """N(0, std^2)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


def uniform(bound: float) -> Any:
    """Uniform in [-bound, bound); torch starts linear layers and convolutions so, with 1/sqrt(fan-in) as the bound."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


def kaiming_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """N(0, 2 / fan-out) for convolution kernels (rows, columns, inputs, outputs), as torchvision (He et al. 2015)."""
    fan_out = shape[0] * shape[1] * shape[3]
    return normal(math.sqrt(2 / fan_out))(key, shape, dtype)


def torch_linear(inputs: int) -> Any:
    """torch's default for weights and biases of linear layers and convolutions of `inputs` inputs.

    (torch calls it Kaiming-uniform with a = sqrt(5).)
    """
    return uniform(1 / math.sqrt(inputs))


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform with variance 2 / (fan-in + fan-out), for kernels (inputs, outputs) (Glorot and Bengio 2010)."""
    return uniform(math.sqrt(6 / sum(shape)))(key, shape, dtype)
