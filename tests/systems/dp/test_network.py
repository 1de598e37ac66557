"""The transformer of Diffusion Policy against published numbers, its two ways of evaluation, and its start."""

from __future__ import annotations

import functools
import math
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.reference import filler
from uwm_jax.systems.dp.network import ActionTransformer

DIM, HEADS, DEPTH, STEPS, COND = 24, 3, 2, 16, 20


def filled(shape: tuple[int, ...], k: int, scale: float) -> np.ndarray:
    return (scale * filler(math.prod(shape), k)).astype(np.float32).reshape(shape)


def tiny(**fields) -> ActionTransformer:
    defaults = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "timestep_embed_dim": STEPS}
    return ActionTransformer(**{"action_dim": 3, "action_len": 4, **defaults, **fields})


@pytest.fixture(scope="module")
def params() -> dict:
    """Formula weights in torch's layouts and order of registration, laid out as ours."""
    numbers = count()

    def linear(outputs: int, inputs: int, split: tuple[int, ...] = (), split_in: tuple[int, ...] = ()) -> dict:
        kernel = filled((outputs, inputs), next(numbers), 0.2).T
        bias = filled((outputs,), next(numbers), 0.2)
        split, split_in = split or (outputs,), split_in or (inputs,)
        return {"kernel": kernel.reshape(*split_in, *split), "bias": bias.reshape(split)}

    def mlp(inputs: int, hidden: int, outputs: int) -> dict:
        return {"fc1": linear(hidden, inputs), "fc2": linear(outputs, hidden)}

    cond, head = COND + STEPS, DIM // HEADS
    made = {"pos_embed": filled((1, 4, DIM), next(numbers), 0.2)}
    made["action_encoder"] = mlp(3, 4 * DIM, DIM)
    made["action_decoder"] = mlp(DIM, 4 * DIM, 3)
    made["timestep_embedding"] = mlp(STEPS, 4 * STEPS, STEPS)
    blocks = [
        {
            "qkv": linear(3 * DIM, DIM, (3, HEADS, head)),
            "proj": linear(DIM, DIM, split_in=(HEADS, head)),
            "fc1": linear(4 * DIM, DIM),
            "fc2": linear(DIM, 4 * DIM),
            "adaln": linear(6 * DIM, cond, (6, DIM)),
        }
        for _ in range(DEPTH)
    ]
    made["blocks"] = jax.tree.map(lambda *layers: np.stack(layers), *blocks)
    made["head"] = {"linear": linear(DIM, DIM), "adaln": linear(2 * DIM, cond, (2, DIM))}
    assert next(numbers) == 37
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def inputs() -> tuple:
    return jnp.asarray(filled((2, COND), 1000, 2.0)), jnp.asarray(filled((2, 4, 3), 1001, 2.0)), jnp.array([7, 90])


@pytest.fixture(scope="module")
def expected(params, inputs) -> np.ndarray:
    return np.asarray(jax.jit(tiny().apply)({"params": params}, *inputs))


def test_published_predictions(expected):
    assert expected.shape == (2, 4, 3) and expected.dtype == np.float32
    np.testing.assert_allclose([expected.mean(), expected.std()], [-0.0240268, 0.0350657], atol=2e-6)
    first, last = [-0.049692, 0.046408, -0.026907, -0.045015, -0.00009], [-0.067671, 0.013083, -0.041335]
    np.testing.assert_allclose(expected.ravel()[:5], first, atol=2e-6)
    np.testing.assert_allclose(expected.ravel()[-3:], last, atol=2e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_modulations_of_all_steps_at_once(params, inputs, expected, scan):
    cond, noisy, _ = inputs
    net, steps = tiny(scan_blocks=scan), jnp.array([90, 50, 7])
    modulation = jax.jit(functools.partial(net.apply, method="modulation"))({"params": params}, cond, steps)
    assert modulation["blocks"].shape == (3, DEPTH, 2, 6, DIM) and modulation["head"].shape == (3, 2, 2, DIM)
    predict = jax.jit(functools.partial(net.apply, method="predict"))
    for step, row in ((2, 0), (0, 1)):  # the timesteps of the two rows of `expected`
        now = jax.tree.map(lambda m, s=step: m[s], modulation)
        np.testing.assert_allclose(predict({"params": params}, noisy, now)[row], expected[row], atol=2e-6)


def test_prediction_is_zero_at_the_start(inputs):
    variables = jax.jit(tiny().init)(jax.random.key(0), *inputs)
    assert (np.asarray(jax.jit(tiny().apply)(variables, *inputs)) == 0).all()


def test_unfit_inputs_are_named(inputs):
    with pytest.raises(ValueError, match=r"noisy must have the shape \(2, 4, 3\), found \(2, 5, 3\)"):
        jax.eval_shape(tiny().init, jax.random.key(0), inputs[0], jnp.zeros((2, 5, 3)), inputs[2])
    with pytest.raises(ValueError, match="even and at least 4, found 2"):
        jax.eval_shape(tiny(timestep_embed_dim=2).init, jax.random.key(0), *inputs)
