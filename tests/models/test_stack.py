"""A stack is its layers in turn, in every form that it runs in."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models import layers
from uwm_jax.models.stack import Stack

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, shared=None):
        return x + jnp.tanh(nn.Dense(4, bias_init=nn.initializers.normal())(x if shared is None else x * shared))


LAYER, SHARED = Layer(parent=None), jnp.array([1.0, 2.0, 0.5, -1.0])


@pytest.fixture(scope="module")
def params():
    return jax.jit(Stack(LAYER, 3).init)(jax.random.key(0), X)["params"]


def test_layers_start_differently(params):
    kernel = params["blocks"]["Dense_0"]["kernel"]
    assert kernel.shape == (3, 4, 4) and not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize("scan, remat, held", [(True, "none", False), (False, "dots", False), (True, "full", True)])
def test_values_and_gradients_of_the_layers_in_turn(params, scan, remat, held):
    def in_turn(params):
        y = X
        for i in range(3):
            y = LAYER.apply({"params": jax.tree.map(lambda p, i=i: p[i], params["blocks"])}, y, SHARED)
        return (y**2).mean(), y

    def stacked(params):
        y = Stack(LAYER, 3, scan, remat).apply({"params": params}, X, SHARED)
        return (y**2).mean(), y

    given = layers.apart(jax.tree.map(jnp.copy, params)) if held else params
    wanted, found = (jax.jit(jax.value_and_grad(f, has_aux=True))(p) for f, p in ((in_turn, params), (stacked, given)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), layers.stacked(found), wanted)


def test_unknown_remat_is_named():
    with pytest.raises(ValueError, match="remat must be one of none, dots, full"):
        jax.eval_shape(Stack(LAYER, 1, remat="all").init, jax.random.key(0), X)
