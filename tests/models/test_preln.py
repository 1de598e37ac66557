"""Pre-LN blocks against published numbers, and the table of positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models.preln import Block
from uwm_jax.models.sincos import sincos_table


def filler(count: int, k: int) -> np.ndarray:
    """The k-th deterministic sequence in [-0.5, 0.5), float64, to which the expected numbers belong."""
    x = 43758.5453 * np.sin(12.9898 * np.arange(1, count + 1, dtype=np.float64) + 78.233 * (k + 1))
    return x - np.floor(x) - 0.5


def test_published_block():
    """Width 24, 3 heads; weights are numbered in torch's order and shapes."""
    block = Block(num_heads=3, mlp_dim=96)
    x = jnp.asarray((2 * filler(2 * 6 * 24, 1005)).astype(np.float32).reshape(2, 6, 24))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    params, k = {}, 0
    for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"):
        for leaf in ("scale" if "norm" in name else "kernel", "bias"):
            shape = shapes[name][leaf].shape
            value = (0.2 * filler(int(np.prod(shape)), k)).astype(np.float32)
            if leaf == "kernel":
                inputs = 96 if name == "fc2" else 24
                value = value.reshape(-1, inputs).T
            params.setdefault(name, {})[leaf] = jnp.asarray(value.reshape(shape) + np.float32(leaf == "scale"))
            k += 1
    apply = jax.jit(block.apply)
    found = np.asarray(apply({"params": params}, x))
    np.testing.assert_allclose([found.mean(), found.std()], [-0.0184483, 0.5637068], atol=2e-6)
    np.testing.assert_allclose(found[0, 0, :5], [-0.735183, 0.859728, -0.392138, -0.490567, 0.321325], atol=2e-6)
    np.testing.assert_allclose(found[-1, -1, -3:], [0.778883, -0.755945, -0.116855], atol=2e-6)
    mask = np.ones((2, 6, 6), bool)
    mask[1, :, 2:4] = False
    for given in (mask, mask[:, :1]):
        masked = np.asarray(apply({"params": params}, x, given))
        np.testing.assert_allclose(masked[-1, -1, -3:], [0.770302, -0.730839, -0.136923], atol=2e-6)
        np.testing.assert_allclose(masked[0], found[0], atol=1e-6)


def test_sincos_table():
    """Element by element from the formula, also where 4 does not divide the width."""
    table = sincos_table(2, 3, 8)
    assert table.shape == (6, 8) and table.dtype == np.float32
    for row in range(2):
        for column in range(3):
            halves = [[np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)] for p in (row, column)]
            np.testing.assert_allclose(table[row * 3 + column], np.concatenate(halves), atol=1e-7)
    odd = sincos_table(2, 3, 6)  # halves of width 4, the last two channels cut off
    np.testing.assert_array_equal(odd, table[:, :6])
