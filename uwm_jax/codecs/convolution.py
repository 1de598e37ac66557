"""Convolutions of channels-last images, in the form that the platform computes fastest.

`convolution` is a drop-in for `jax.lax.conv_general_dilated` that flax's `nn.Conv` takes as its field of that name.
Accelerators run XLA's own convolution. On a CPU, where that is slower than PyTorch's, a 3x3 convolution at stride 1 in
float32 is computed by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308), with 36
products per 16 outputs instead of 144. On accelerators the same would add memory traffic and lose matrix units' shapes,
and where axes are divided over devices, the partitioner knows the plain convolution best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models.activations import on_one_cpu

Array = jax.Array
Padding = Sequence[tuple[int, int]]

TILE = 4  # outputs of one tile along rows and columns
POINTS = TILE + 2  # inputs of it, and products, along rows and columns
# Interpolation at 0, +-3/4, +-3/2 and infinity: rounding errors are half of those at the usual 0, +-1, +-2, and 3
# times those of the sum itself (1e-6 of the outputs' size in float32). The first two matrices map
# inputs and weights to POINTS values, the last one maps their products to outputs.
INPUT_TRANSFORM = np.array(
    [
        [81 / 64, 0, -45 / 16, 0, 1, 0],
        [0, -27 / 16, -9 / 4, 3 / 4, 1, 0],
        [0, 27 / 16, -9 / 4, -3 / 4, 1, 0],
        [0, -27 / 32, -9 / 16, 3 / 2, 1, 0],
        [0, 27 / 32, -9 / 16, -3 / 2, 1, 0],
        [0, 81 / 64, 0, -45 / 16, 0, 1],
    ]
)
KERNEL_TRANSFORM = np.array(
    [
        [64 / 81, 0, 0],
        [-128 / 243, -32 / 81, -8 / 27],
        [-128 / 243, 32 / 81, -8 / 27],
        [32 / 243, 16 / 81, 8 / 27],
        [32 / 243, -16 / 81, 8 / 27],
        [0, 0, 1],
    ]
)
OUTPUT_TRANSFORM = np.array(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 3 / 4, -3 / 4, 3 / 2, -3 / 2, 0],
        [0, 9 / 16, 9 / 16, 9 / 4, 9 / 4, 0],
        [0, 27 / 64, -27 / 64, 27 / 8, -27 / 8, 1],
    ]
)
MIN_CHANNELS = 32
MIN_TILES = 16  # with fewer, transforming the kernel costs what is gained
STRIP_BYTES = 16 << 20  # of transformed inputs at a time: what stays in a CPU's last cache


def convolution(x: Array, kernel: Array, strides: Sequence[int], padding: Padding, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated` of images (N, H, W, C), as `flax.linen.Conv.conv_general_dilated`.

    Args:
        kernel: (rows, columns, C, outputs).
        padding: (before, after) of rows and of columns.
        options: the other arguments of `jax.lax.conv_general_dilated`.
    """
    if on_one_cpu() and _has_winograd_form(x, kernel, strides, padding, options):
        return _winograd(x, kernel, options.get("precision"))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _has_winograd_form(
    x: Array, kernel: Array, strides: Sequence[int], padding: Padding, options: dict[str, Any]
) -> bool:
    if x.ndim != 4 or x.dtype != jnp.float32 or kernel.dtype != jnp.float32 or kernel.shape[:2] != (3, 3):
        return False
    dilations = [*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())]
    if {*strides, *dilations, options.get("feature_group_count", 1)} != {1}:
        return False
    tiles = len(x) * math.prod(-(-n // TILE) for n in x.shape[1:3])
    return (
        all(tuple(pair) == (1, 1) for pair in padding) and min(kernel.shape[2:]) >= MIN_CHANNELS and tiles >= MIN_TILES
    )


class _Strips:
    """How a map is cut into strips of whole rows of tiles, all columns of all images in each."""

    def __init__(self, shape: tuple[int, ...], channels: int) -> None:
        self.images, height, width = shape[:3]
        down, self.across = -(-height // TILE), -(-width // TILE)
        row = self.images * self.across * POINTS**2 * channels * 4  # bytes of a row of tiles
        self.down = -(-down // min(down, -(-down * row // STRIP_BYTES)))  # rows of tiles in a strip
        self.count = -(-down // self.down)
        self.tiles = self.images * self.down * self.across  # of a strip
        rows, columns = self.count * self.down * TILE, self.across * TILE
        self.shape = (self.images, rows, columns)
        self.end = (rows - height, columns - width)  # rows and columns that fill up the last tiles

    def pad(self, x: Array) -> Array:
        below, right = self.end
        return jnp.pad(x, ((0, 0), (1, 1 + below), (1, 1 + right), (0, 0)))

    def cut(self, x: Array, index: Array | int) -> Array:
        rows = self.down * TILE
        return x if self.count == 1 else jax.lax.dynamic_slice_in_dim(x, index * rows, rows + 2, axis=1)


def _winograd(x: Array, kernel: Array, precision: Any) -> Array:
    """3x3 convolution with a margin of one zero."""
    channels, outputs = kernel.shape[2:]
    # A zero whose sign is known only with x: otherwise XLA transforms the kernels of all layers first and holds them.
    kernel = kernel + jnp.where(x[0, 0, 0, 0] > 0, 0.0, -0.0)
    weights = jnp.stack(_combine(KERNEL_TRANSFORM, list(kernel)))  # (POINTS, 3, C, O)
    weights = jnp.stack(_combine(KERNEL_TRANSFORM, list(weights.swapaxes(0, 1))), 1)
    weights = weights.reshape(POINTS**2, channels, outputs)
    height, width = x.shape[1:3]
    strips = _Strips(x.shape, max(channels, outputs))
    x = strips.pad(x)

    def strip(x: Array, index: Array | int) -> Array:
        values = _input_values(strips.cut(x, index), strips)
        products = jnp.einsum("ptc,pco->pto", values, weights, precision=precision)
        return _outputs(products, strips)

    if strips.count == 1:
        return strip(x, 0)[:, :height, :width]

    def body(carry: tuple[Array, ...], index: Array) -> tuple[tuple[Array, ...], None]:
        part = strip(carry[0], index)
        y = jax.lax.dynamic_update_slice_in_dim(carry[-1], part, index * strips.down * TILE, axis=1)
        return (*carry[:-1], y), None

    # with as many outputs as inputs, a strip takes the place of inputs that no later one reads
    carry: tuple[Array, ...] = (x,) if channels == outputs else (x, jnp.zeros((*strips.shape, outputs), x.dtype))
    carry, _ = jax.lax.scan(body, carry, jnp.arange(strips.count))
    return carry[-1][:, :height, :width]


def _tiles(x: Array, axis: int, size: int, count: int) -> list[Array]:
    """Element i of each of `count` tiles along `axis`, for i < `size`."""
    return [jax.lax.slice_in_dim(x, i, i + TILE * (count - 1) + 1, TILE, axis=axis) for i in range(size)]


def _input_values(x: Array, strips: _Strips) -> Array:
    """(POINTS**2, tiles, C) of a strip with its margins."""
    # stacked, so that XLA does not fuse both axes into one loop that reads every input 36 times
    x = jnp.stack(_combine(INPUT_TRANSFORM, _tiles(x, 1, POINTS, strips.down)))
    x = jnp.stack(_combine(INPUT_TRANSFORM, _tiles(x, 3, POINTS, strips.across)), 1)
    return x.reshape(POINTS**2, strips.tiles, x.shape[-1])


def _outputs(products: Array, strips: _Strips) -> Array:
    """(POINTS**2, tiles, O) -> (N, down * TILE, across * TILE, O) of a strip."""
    n, down, across, outputs = strips.images, strips.down, strips.across, products.shape[-1]
    products = products.reshape(POINTS, POINTS, n, down, across, outputs)
    rows = jnp.stack(_combine(OUTPUT_TRANSFORM, list(products)))
    y = jnp.stack(_combine(OUTPUT_TRANSFORM, list(rows.swapaxes(0, 1))), 4)  # (TILE, N, down, across, TILE, O)
    return y.transpose(1, 2, 0, 3, 4, 5).reshape(n, down * TILE, across * TILE, outputs)


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """The sums of `parts` with the weights of each row of `matrix`."""
    weighted = ([float(w) * part for w, part in zip(row, parts, strict=True) if w] for row in matrix)
    return [sum(rest, first) for first, *rest in weighted]
