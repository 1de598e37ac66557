"""Products of activations with kernels of more than two axes, as each platform computes them best.

Kernels keep head and channel axes apart so that either can be sharded (`transformer.py`). XLA's CPU compiler, however,
copies a kernel with several input or output axes into another layout for every product with its transpose, that is in
every backward pass: a copy of AdaLN's kernel takes a dozen times as long as its product with a few rows. As a matrix,
which the same memory is, it is used where it lies. Where the compiler divides an axis over devices, merging it with
another would move data, so there, and on accelerators, which choose their own layouts, the axes stay.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from uwm_jax.models.activations import on_one_cpu

Array = jax.Array


def dot_general(inputs: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of the last axes of `inputs` with the first ones of `kernel`, for Flax's dense layers."""
    contracted, batch = dimension_numbers
    count = len(contracted[0])
    expected = (tuple(range(inputs.ndim - count, inputs.ndim)), tuple(range(count)))
    if tuple(map(tuple, contracted)) != expected or any(map(len, batch)):
        raise ValueError(f"expected a product of the last axes with the first ones, found {dimension_numbers}")
    if not on_one_cpu():
        return jax.lax.dot_general(inputs, kernel, dimension_numbers, **options)
    lead, size = inputs.shape[:-count], math.prod(kernel.shape[:count])
    rows, matrix = inputs.reshape(-1, size), kernel.reshape(size, -1)
    product = jax.lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*lead, *kernel.shape[count:])
