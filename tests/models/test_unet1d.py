"""The 1-D U-Net against published numbers, its two ways of evaluation, its start and its refusals."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.reference import filler
from uwm_jax.models.unet1d import UNet1D


def filled(shape: tuple[int, ...], k: int, scale: float) -> np.ndarray:
    return (scale * filler(math.prod(shape), k)).astype(np.float32).reshape(shape)


def tiny(**fields) -> UNet1D:
    defaults = {"dim": 3, "length": 16, "down_dims": (16, 32, 64), "timestep_embed_dim": 16}
    return UNet1D(**{**defaults, **fields})


def reference_params(shapes: dict) -> dict:
    """Formula weights in torch's layouts, numbered in torch's order of registration."""
    numbers = count()

    def fill(like, torch_shape, to_ours, offset=0.0):
        return jnp.asarray(to_ours(filled(torch_shape, next(numbers), 0.2) + np.float32(offset)).reshape(like.shape))

    def conv(like: dict) -> dict:
        kernel = fill(like["kernel"], like["kernel"].shape[::-1], lambda w: w.transpose(2, 1, 0))
        return {"kernel": kernel, "bias": fill(like["bias"], like["bias"].shape, np.asarray)}

    def linear(like: dict) -> dict:
        inputs, *outputs = like["kernel"].shape
        kernel = fill(like["kernel"], (math.prod(outputs), inputs), np.transpose)
        return {"kernel": kernel, "bias": fill(like["bias"], (math.prod(outputs),), np.asarray)}

    def conv_block(like: dict) -> dict:
        made = {"conv": conv(like["conv"])}
        scale = fill(like["norm"]["scale"], like["norm"]["scale"].shape, np.asarray, 1.0)
        return made | {"norm": {"scale": scale, "bias": fill(like["norm"]["bias"], scale.shape, np.asarray)}}

    def residual(like: dict) -> dict:
        made = {name: conv_block(like[name]) for name in ("block1", "block2")} | {"film": linear(like["film"])}
        return made | ({"shortcut": conv(like["shortcut"])} if "shortcut" in like else {})

    def names() -> Iterator[tuple]:
        yield from ((f"mid_{i}", residual) for i in range(2))
        yield "timestep_embedding", lambda like: {name: linear(like[name]) for name in ("fc1", "fc2")}
        for way, change, levels in (("up", "double", 2), ("down", "halve", 3)):
            for level in range(levels):
                yield from ((f"{way}_{level}_{i}", residual) for i in range(2))
                if level < 2:
                    yield f"{change}_{level}", conv
        yield from (("final", conv_block), ("output", conv))

    params = {name: make(shapes[name]) for name, make in names()}
    assert next(numbers) == 148 and params.keys() == shapes.keys()
    return params


@pytest.fixture(scope="module")
def inputs() -> tuple:
    cond, noisy = filled((2, 20), 1000, 2.0), filled((2, 16, 3), 1001, 2.0)
    return jnp.asarray(cond), jnp.asarray(noisy), jnp.array([7, 90])


@pytest.fixture(scope="module")
def params(inputs) -> dict:
    return reference_params(jax.eval_shape(tiny().init, jax.random.key(0), *inputs)["params"])


@pytest.fixture(scope="module")
def expected(params, inputs) -> np.ndarray:
    return np.asarray(jax.jit(tiny().apply)({"params": params}, *inputs))


def test_published_predictions(expected):
    assert expected.shape == (2, 16, 3) and expected.dtype == np.float32
    np.testing.assert_allclose([expected.mean(), expected.std()], [-0.0089389, 0.1921771], atol=2e-6)
    first, last = [0.154478, -0.163017, -0.044412, 0.072572, -0.236669], [-0.11252, -0.267977, 0.120127]
    np.testing.assert_allclose(expected.ravel()[:5], first, atol=2e-6)
    np.testing.assert_allclose(expected.ravel()[-3:], last, atol=2e-6)


def test_modulations_of_all_steps_at_once(params, inputs, expected):
    cond, noisy, _ = inputs
    net, steps = tiny(), jnp.array([90, 50, 7])
    modulation = jax.jit(functools.partial(net.apply, method="modulation"))({"params": params}, cond, steps)
    assert modulation["up_1_0"].shape == (3, 2, 2, 16) and len(modulation) == 12
    predict = jax.jit(functools.partial(net.apply, method="predict"))
    for step, row in ((2, 0), (0, 1)):  # the timesteps of the two rows of `expected`
        now = jax.tree.map(lambda m, s=step: m[s], modulation)
        np.testing.assert_allclose(predict({"params": params}, noisy, now)[row], expected[row], atol=2e-6)


def test_bfloat16_stays_close_and_ends_in_float32(params, inputs, expected):
    net = tiny(dtype=jnp.bfloat16)
    predicted = jax.jit(net.apply)({"params": params}, *inputs)
    assert predicted.dtype == jnp.float32
    assert 0 < np.abs(predicted - expected).max() < 3e-2 * np.abs(expected).max()
    grads = jax.eval_shape(jax.grad(lambda p: jnp.square(net.apply({"params": p}, *inputs)).mean()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_size_of_the_official_network():
    args = jnp.zeros((1, 3072)), jnp.zeros((1, 16, 7)), jnp.zeros(1, int)
    shapes = jax.eval_shape(UNet1D(7, 16).init, jax.random.key(0), *args)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == 86.58


def test_start(inputs):
    """torch's: kernels and biases uniform in +-1/sqrt(inputs); a transposed convolution's are its outputs there."""
    inputs_of = {"down_2_0/block1/conv": 32 * 3, "down_1_1/film": 36, "double_0": 32 * 4, "timestep_embedding/fc1": 16}

    @jax.jit
    def start(key):  # a few of the arrays, because each takes long to compile
        params = tiny(fourier=True).init(key, *inputs)["params"]
        flat = {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
        wanted = [f"{name}/{leaf}" for name in inputs_of for leaf in ("kernel", "bias")]
        return {name: flat[name] for name in [*wanted, "timestep_embedding/frequency"]}

    params = start(jax.random.key(0))
    for name, fan_in in inputs_of.items():
        both = np.concatenate([np.ravel(params[f"{name}/{leaf}"]) for leaf in ("kernel", "bias")]) * math.sqrt(fan_in)
        assert 0.99 < np.abs(both).max() <= 1 and abs(both.std() - 3**-0.5) < 2 / math.sqrt(both.size), name
    assert params["timestep_embedding/frequency"].shape == (8,)
    assert 5 < np.std(params["timestep_embedding/frequency"]) < 30


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"length": 10}, "length must be a multiple of 4, .* found 10"),
        ({"down_dims": (16, 20)}, "multiples of groups 8"),
        ({"down_dims": (16,)}, "two or more"),
        ({"down_dims": (12, 24), "groups": 4}, "the first one of 8"),
        ({"kernel_size": 4}, "kernel_size must be odd, found 4"),
        ({"timestep_embed_dim": 7}, "even and at least 4, found 7"),
    ],
)
def test_unusable_fields_are_named(inputs, fields, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(tiny(**fields).init, jax.random.key(0), *inputs)
