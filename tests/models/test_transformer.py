"""Parts of the transformer against published numbers and closed forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models import layers
from uwm_jax.models.adaln import StepConditions
from uwm_jax.models.transformer import BlockStack, Head, layer_norm, sinusoid

WIDTH, HEADS, DEPTH, ROWS, LENGTH, FEATURES, TIME, STEPS = 12, 3, 2, 3, 5, 4, 6, 2


def test_sinusoid_published_values():
    embedded = sinusoid(jnp.array([5, 99]), 8)
    wanted = [
        [-0.95892, 0.23000, 0.010772, 0.0005, 0.28366, 0.97319, 0.99994, 1.0],
        [-0.99921, -0.99314, 0.21168, 0.0098998, 0.039821, -0.11695, 0.97734, 0.99995],
    ]
    np.testing.assert_allclose(embedded, wanted, atol=6e-6)


def test_layer_norm_of_a_large_offset():
    """One-pass variance would lose all digits here; the float32 mean itself is good to 1e-4 of 0.1."""
    x = np.random.default_rng(0).normal(1e3, 0.1, (3, 5, 24)).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x)), wanted, atol=2e-3)


def test_head_modulation_order():
    """The head's first modulation is the shift: with a unit kernel it comes out as it went in."""
    x, shift = jnp.ones((1, 2, 4)), jnp.array([[1.0, 2.0, 3.0, 4.0]])
    params = {
        "linear": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "adaln": {"kernel": jnp.zeros((3, 2, 4)), "bias": jnp.zeros((2, 4))},
    }
    out = Head(4, jnp.float32).apply({"params": params}, x, jnp.stack([shift, 7 * shift], axis=1))
    np.testing.assert_allclose(out, jnp.broadcast_to(shift, (1, 2, 4)))


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


@pytest.fixture(scope="module")
def blocks() -> dict:
    """Parameters of DEPTH blocks, none of them zero."""
    make = functools.partial(BlockStack(WIDTH, DEPTH, HEADS).init, cond_dim=FEATURES + TIME)
    shapes = jax.eval_shape(make, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [0.3 * random(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def stream() -> tuple[jax.Array, jax.Array]:
    return random(100, ROWS, LENGTH, WIDTH), random(101, ROWS, FEATURES + TIME)


def close(actual, wanted, tolerance=1e-5):
    """Within a part of each leaf's largest value."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * abs(b).max()), actual, wanted)


def test_hidden_keys_have_no_influence(blocks, stream):
    """Masked keys give the values and gradients of a shorter sequence."""
    x, cond = stream
    stack, kept, params = BlockStack(WIDTH, DEPTH, HEADS, remat="dots"), LENGTH - 2, {"blocks": blocks}

    @jax.jit
    def gradients(x, mask=None):
        """Of the last tokens' squares, by all tokens; and all tokens."""

        def loss(x):
            y, _ = stack(params, x, cond, mask)
            return jnp.sum(y[:, -kept:] ** 2), y

        return jax.grad(loss, has_aux=True)(x)

    keys = jnp.broadcast_to(jnp.arange(LENGTH) >= LENGTH - kept, (ROWS, LENGTH))
    gradient, hidden = gradients(x, keys)
    assert not np.asarray(gradient[:, :-kept]).any()
    close((gradient[:, -kept:], hidden[:, -kept:]), gradients(x[:, -kept:]))
    full, mixed = jax.jit(lambda x, masks: (stack(params, x, cond)[0], stack(params, x, cond, masks)[0]))(
        x, jnp.broadcast_to(keys.at[1:].set(True)[:, None], (ROWS, LENGTH, LENGTH))
    )
    close((mixed[1:], mixed[:1]), (full[1:], hidden[:1]))
    assert np.abs(full - hidden).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize(
    "order, form", [("features first", "stacked"), ("time first", "apart"), ("time alone", "stacked")]
)
def test_modulations_of_all_steps(blocks, stream, order, form):
    x, _ = stream
    features, time = random(102, ROWS, FEATURES), random(103, STEPS, TIME)
    if order == "time alone":
        blocks = {**blocks, "adaln": {**blocks["adaln"], "kernel": blocks["adaln"]["kernel"][:, :TIME]}}
        features = None
    head = {"linear": {}, "adaln": jax.tree.map(lambda leaf: leaf[0, ..., :2, :], blocks["adaln"])}
    held = layers.apart({"blocks": jax.tree.map(jnp.array, blocks)})["blocks"] if form == "apart" else blocks
    stack = BlockStack(WIDTH, DEPTH, HEADS)

    @jax.jit
    def at_once(held, features, time):
        conditions = StepConditions.join(features, time, time_first=order == "time first")
        modulation = stack.modulation({"blocks": held}, conditions)
        of_head = Head(WIDTH, jnp.float32).apply({"params": head}, conditions, method="step_modulation")
        of_head = jnp.broadcast_to(of_head, (STEPS, ROWS, 2, WIDTH))
        return [stack.apply_modulated({"blocks": held}, x, modulation[s]) for s in range(STEPS)], of_head

    @jax.jit
    def one_by_one(cond):
        of_head = jnp.einsum("bc,ckd->bkd", cond, head["adaln"]["kernel"]) + head["adaln"]["bias"]
        return stack({"blocks": blocks}, x, cond), of_head

    streams, of_head = at_once(held, features, time)
    for s in range(STEPS):
        now = jnp.broadcast_to(time[s], (ROWS, TIME))
        parts = {"features first": (features, now), "time first": (now, features), "time alone": (now,)}[order]
        close((streams[s], of_head[s]), one_by_one(jax.nn.silu(jnp.concatenate(parts, axis=1))))


def test_scanned_parameters_are_cast_once(blocks, stream, monkeypatch):
    """In bfloat16 no stack of float32 enters or leaves the loops; values and gradients are those of casts in them."""
    x, cond = stream
    stack = BlockStack(WIDTH, DEPTH, HEADS, dtype=jnp.bfloat16)

    def loss(blocks):
        return jnp.sum(stack({"blocks": blocks}, x, cond)[0] ** 2)

    def stacks_of_loops():
        jaxpr = jax.make_jaxpr(jax.grad(loss))(blocks).jaxpr
        loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        assert len(loops) == 2
        kernels = {leaf.shape for leaf in jax.tree.leaves(blocks)}
        return [v.aval.dtype for e in loops for v in (*e.invars, *e.outvars) if v.aval.shape in kernels]

    once = jax.jit(jax.value_and_grad(loss))(blocks)
    assert set(stacks_of_loops()) == {jnp.dtype(jnp.bfloat16)}
    monkeypatch.setattr(layers, "in_dtype", lambda layers, dtype, scan: layers)
    assert jnp.dtype(jnp.float32) in stacks_of_loops()
    jax.tree.map(np.testing.assert_array_equal, once, jax.jit(jax.value_and_grad(loss))(blocks))
