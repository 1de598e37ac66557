"""AdaLN's variants against the official one, and its layout over devices, decided from shapes in a trace."""

from __future__ import annotations

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from uwm_jax.models import layers
from uwm_jax.models.adaln import StepConditions, Variant, kernel_stays_cut
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
            y, _ = stack({"blocks": blocks}, x[:, None], cond)
            return y, head.apply(of_head, cond, method="row_modulation")

    found = constraints(jax.make_jaxpr(run)(blocks, of_head, x, cond).jaxpr)
    by_width, by_rows = (None, None, ("tensor", "fsdp")), ("fsdp",)
    for outputs in (6, 2):
        specs = [spec for shape, spec in found if shape == (rows, outputs, WIDTH)]
        assert specs == ([by_width, ("fsdp", None, "tensor"), by_rows] if cut else [by_rows])
    assert [spec for shape, spec in found if shape == (rows, COND)] == ([(None,)] * 2 if cut else [])


# --- variants --------------------------------------------------------------------------------------------

STACK = functools.partial(BlockStack, 12, 3, 3)  # three blocks of width 12
SHARED, LOW_RANK = Variant("shared"), Variant("low_rank", rank=2)
FEATURES, TIME, ROWS, LENGTH, STEPS = 4, 6, 2, 5, 2


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape), jnp.float32)


class Owner(nn.Module):
    """A module that has a stack's parameters."""

    stack: BlockStack

    @nn.compact
    def __call__(self, x, cond):
        return self.stack(self.stack.params_of(self, cond.shape[-1]), x, cond)


def made(variant: Variant) -> dict:
    shapes = jax.eval_shape(Owner(STACK(variant=variant)).init, jax.random.key(0), *tokens())["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [random(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def tokens() -> tuple[jax.Array, jax.Array]:
    return random(100, ROWS, LENGTH, 12), random(101, ROWS, FEATURES + TIME)


def as_official(params: dict, variant: Variant) -> dict:
    """The official blocks of the same function: every one with its own full kernel."""
    adaln = params["blocks"]["adaln"]
    if variant.is_shared:
        kernel = jnp.stack([params["adaln"]["kernel"]] * 3)
    else:
        kernel = jnp.einsum("lkr,lrmd->lkmd", adaln["down"], adaln["kernel"])
    return {"blocks": {**params["blocks"], "adaln": {"kernel": kernel, "bias": adaln["bias"]}}}


@pytest.mark.parametrize("variant", [SHARED, LOW_RANK], ids=lambda v: v.kind)
def test_a_variant_is_the_official_one_with_its_kernels_written_out(variant):
    params, (x, cond), stack = made(variant), tokens(), STACK(variant=variant)

    def run(stack, params, x, cond):
        def loss(x, cond):
            y, hidden = stack(params, x, cond)
            return jnp.sum(y**2), hidden

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, cond)

    @jax.jit
    def both(params, x, cond):
        return run(stack, params, x, cond), run(STACK(), as_official(params, variant), x, cond)

    found, wanted = both(params, x, cond)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * abs(b).max()), found, wanted)


@pytest.mark.parametrize("variant, form", [(SHARED, "stacked"), (SHARED, "apart"), (LOW_RANK, "apart")])
def test_the_sampler_of_a_variant_makes_the_modulations_of_its_official_form(variant, form):
    params, stack = made(variant), STACK(variant=variant)
    features, time = random(102, ROWS, FEATURES), random(103, STEPS, TIME)
    held = layers.apart(jax.tree.map(jnp.copy, params)) if form == "apart" else params

    @jax.jit
    def both(held, params):
        conditions = StepConditions.join(features, time)
        official = STACK().modulation(as_official(params, variant), conditions)
        alone = StepConditions.join(None, time)  # in place of both: as wide as the kernels read
        alone = StepConditions(jnp.pad(alone.activated, ((0, 0), (FEATURES, 0))), 0)
        of_time = stack.modulation(held, alone), STACK().modulation(as_official(params, variant), alone)
        return stack.modulation(held, conditions), official, *of_time

    found, official, of_time, official_of_time = both(held, params)
    assert found.shape == (STEPS, 3, ROWS, 6, 12) and of_time.shape == (STEPS, 3, 1, 6, 12)
    np.testing.assert_allclose(found, official, atol=1e-5)
    np.testing.assert_allclose(of_time, official_of_time, atol=1e-5)


@pytest.mark.parametrize("variant", [SHARED, LOW_RANK], ids=lambda v: v.kind)
def test_variants_start_as_the_identity_and_learn_from_there(variant):
    """Gates are zero; gradients reach the kernels all the same."""
    stack, (x, cond) = STACK(variant=variant), tokens()
    owner = Owner(stack)

    @jax.jit
    def start(key):
        params = owner.init(key, x, cond)["params"]
        gradients = jax.grad(lambda p: jnp.sum(owner.apply({"params": p}, x, cond)[0] * x))(params)
        return params, owner.apply({"params": params}, x, cond)[0], gradients

    params, y, gradients = start(jax.random.key(0))
    np.testing.assert_array_equal(y, x)
    kernels = gradients["adaln"] if variant.is_shared else gradients["blocks"]["adaln"]
    assert np.abs(kernels["kernel"]).max() > 0
    assert ("adaln" in params, "down" in params["blocks"]["adaln"]) == (variant.is_shared, variant.kind == "low_rank")


@pytest.mark.parametrize("variant", [Variant(), SHARED, LOW_RANK], ids=lambda v: v.kind)
def test_every_product_is_counted(variant, count_products):
    stack = STACK(variant=variant)
    x, cond = jnp.zeros((1, LENGTH, 12)), jnp.zeros((1, FEATURES + TIME))
    shapes = jax.eval_shape(Owner(stack).init, jax.random.key(0), x, cond)["params"]
    assert count_products(lambda p: stack(p, x, cond)[0], shapes) == stack.flops(LENGTH, FEATURES + TIME)


def test_unusable_variants_are_named():
    with pytest.raises(ValueError, match="adaln must be one of official, shared, low_rank; found 'own'"):
        Variant("own")
    with pytest.raises(ValueError, match="adaln_rank must be at least 1, found 0"):
        Variant("low_rank")
