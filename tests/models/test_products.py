"""Products with kernels of several axes against `jax.lax.dot_general`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from uwm_jax.models import products

CASES = {  # inputs, kernel, axes that are summed over
    "adaln": ((2, 5), (5, 6, 4), 1),
    "qkv": ((2, 7, 6), (6, 3, 2, 3), 1),
    "proj": ((2, 7, 2, 3), (2, 3, 6), 2),
    "dense": ((2, 7, 6), (6, 4), 1),
}
dot_general = functools.partial(products.dot_general, precision=jax.lax.Precision.HIGHEST)
plain = functools.partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def dimensions(inputs, count):
    return (tuple(range(inputs.ndim - count, inputs.ndim)), tuple(range(count))), ((), ())


def gradients(product, inputs, kernel, count):
    def loss(inputs, kernel):
        out = product(inputs, kernel, dimensions(inputs, count))
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs, kernel)


def require_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_plain_product(case):
    lead, kernel, count = CASES[case]
    inputs, kernel = draw(0, lead), draw(1, kernel)
    require_close(gradients(dot_general, inputs, kernel, count), gradients(plain, inputs, kernel, count))


@pytest.mark.parametrize("case", CASES)
def test_they_are_so_for_a_stack_of_kernels_and_under_remat(case):
    lead, kernel, count = CASES[case]
    inputs, kernels = draw(0, lead), draw(1, (3, *kernel))

    def over(product):
        one = jax.checkpoint(lambda kernel: gradients(product, inputs, kernel, count))
        return jax.lax.map(one, kernels), jax.vmap(one)(kernels)

    require_close(over(dot_general), over(plain))


def axes_of_kernels(function, *args):
    """How many axes the second operand of each product has in the program."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [e.invars[1].aval.ndim for e in jaxpr.eqns if e.primitive.name == "dot_general"]


@pytest.mark.parametrize(("backend", "axes"), [("cpu", 2), ("gpu", 3), ("tpu", 3)])
def test_kernels_are_matrices_on_cpus_alone(monkeypatch, backend, axes):
    inputs, kernel = draw(0, (2, 5)), draw(1, (5, 6, 4))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert axes_of_kernels(lambda x, k: dot_general(x, k, dimensions(x, 1)), inputs, kernel) == [axes]


def test_kernels_that_the_compiler_divides_keep_their_axes():
    inputs, kernel = draw(0, (2, 5)), draw(1, (5, 6, 4))

    def product(x, k):
        return dot_general(x, k, dimensions(x, 1))

    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules((("heads", "tensor"),)):
        assert axes_of_kernels(product, inputs, kernel) == [3]
        rows = PartitionSpec("data")
        specs = {"in_specs": (rows, PartitionSpec()), "out_specs": rows, "axis_names": {"data", "tensor"}}
        manual = jax.shard_map(product, **specs, check_vma=False)
        (inner,) = (e.params["jaxpr"] for e in jax.make_jaxpr(manual)(inputs, kernel).eqns)
        assert [e.invars[1].aval.ndim for e in inner.eqns if e.primitive.name == "dot_general"] == [2]


def test_other_products_are_refused():
    with pytest.raises(ValueError, match="last axes with the first ones"):
        products.dot_general(jnp.ones((2, 3)), jnp.ones((4, 3)), (((1,), (1,)), ((), ())))
