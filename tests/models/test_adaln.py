"""AdaLN's layout over devices, decided from shapes while a program is traced."""

from __future__ import annotations

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from uwm_jax.models.adaln import kernel_stays_cut
from uwm_jax.models.transformer import BlockStack, Head

RULES = (("batch", ("data", "fsdp")), ("length", None), ("heads", "tensor"), ("width", ("tensor", "fsdp")))
WIDTH, COND = 768, 5120  # DROID's


@contextlib.contextmanager
def devices(data=1, fsdp=1, tensor=1, rules=RULES):
    mesh = AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with nn.logical_axis_rules(rules), jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize(
    "rows, block, head",
    [(144, True, True), (1535, True, True), (1536, True, False), (4096, True, False), (4608, False, False)],
)
def test_the_smaller_of_conditions_and_kernel_is_made_whole(rows, block, head):
    """rows * 5120 numbers against 5120 * 6 * 768 of a block's kernel and 5120 * 2 * 768 of the head's."""
    with devices(fsdp=16):
        assert (kernel_stays_cut(rows, 6, WIDTH), kernel_stays_cut(rows, 2, WIDTH)) == (block, head)
        assert kernel_stays_cut(rows, 6, WIDTH) == (rows * COND < COND * 6 * WIDTH)
    with devices(data=4, fsdp=4):  # a quarter of the rows share a kernel
        assert kernel_stays_cut(4 * rows, 6, WIDTH) == block


def test_kernels_that_no_rows_share_are_left_alone():
    for sizes in ({"data": 16}, {"data": 4, "tensor": 4}, {}):
        with devices(**sizes):
            assert not kernel_stays_cut(144, 6, WIDTH), sizes
    with devices(fsdp=10):  # does not divide the width, so the kernel is not cut
        assert not kernel_stays_cut(140, 6, WIDTH)
    with devices(fsdp=16, rules=RULES[:1]):  # a table of one's own without `width`
        assert not kernel_stays_cut(144, 6, WIDTH)


def constraints(jaxpr) -> list:
    """The layouts that a program asks for, with their shapes, of loops and what else it calls too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            found.append((equation.invars[0].aval.shape, tuple(equation.params["sharding"].spec)))
        for inner in jax.core.jaxprs_in_params(equation.params):
            found += constraints(inner)
    return found


@pytest.mark.parametrize("rows, cut", [(144, True), (4608, False)])
def test_layouts_of_conditions_and_modulations(rows, cut):
    """Conditions whole and modulations by width, then by rows; at once by rows where the kernel is the smaller one."""
    stack, head = BlockStack(WIDTH, 2, 12), Head(WIDTH, jnp.float32)
    blocks = jax.eval_shape(lambda key: stack.init(key, COND), jax.random.key(0))
    cond, x = (jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (COND, WIDTH))
    of_head = jax.eval_shape(lambda key, c: head.init(key, c, method="row_modulation"), jax.random.key(0), cond)

    def run(blocks, of_head, x, cond):
        with devices(fsdp=8, tensor=2):
            y, _ = stack(blocks, x[:, None], cond)
            return y, head.apply(of_head, cond, method="row_modulation")

    found = constraints(jax.make_jaxpr(run)(blocks, of_head, x, cond).jaxpr)
    by_width, by_rows = (None, None, ("tensor", "fsdp")), ("fsdp",)
    for outputs in (6, 2):
        specs = [spec for shape, spec in found if shape == (rows, outputs, WIDTH)]
        assert specs == ([by_width, by_rows] if cut else [by_rows])
    assert [spec for shape, spec in found if shape == (rows, COND)] == ([(None,)] * 2 if cut else [])
