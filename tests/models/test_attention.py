"""Attention against softmax in numpy; cuDNN's against XLA's where there is a GPU, and what it refuses anywhere."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.small import SYSTEMS, small_config
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.models.attention import attend
from uwm_jax.models.target import tracing_for
from uwm_jax.synthetic import synthetic_batch, synthetic_system

ROWS, QUERIES, KEYS, HEADS, CHANNELS = 2, 5, 7, 2, 8
MASKS = {"none": None, "keys": (ROWS, 1, KEYS), "all": (ROWS, QUERIES, KEYS)}
NO_GPU = jax.default_backend() != "gpu"


def inputs(dtype=jnp.float32, channels=CHANNELS, queries=QUERIES, keys=KEYS):
    rng = np.random.default_rng(0)
    shapes = (queries, keys, keys)
    return tuple(jnp.asarray(rng.normal(size=(ROWS, n, HEADS, channels)), dtype) for n in shapes)


def mask_of(kind):
    """Half of the keys are seen, the first always."""
    if (shape := MASKS[kind]) is None:
        return None
    return jnp.asarray(np.random.default_rng(1).random(shape) < 0.5).at[..., 0].set(True)


def by_numpy(q, k, v, mask):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(np.asarray(mask)[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhc->bqhc", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("kind", MASKS)
def test_is_softmax_of_scaled_products(kind):
    mask = mask_of(kind)
    np.testing.assert_allclose(attend(*inputs(), mask), by_numpy(*inputs(), mask), atol=1e-6)


@pytest.fixture
def calls(monkeypatch):
    """The calls of jax's attention as (implementation, queries, keys); XLA does the work of cuDNN."""
    made, plain = [], jax.nn.dot_product_attention

    def attention(q, k, v, implementation=None, **hidden):
        made.append((implementation, q.shape[1], k.shape[1]))
        return plain(q, k, v, implementation="xla", **hidden)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return made


def assert_same_values_and_gradients(arrays, mask):
    """Of cuDNN and XLA, in bfloat16, whose spacing at 1 is 2**-7."""

    def both(arrays, kind):
        def squares(arrays):
            y = attend(*arrays, mask, kind).astype(jnp.float32)
            return jnp.sum(jnp.square(y)), y

        return jax.grad(squares, has_aux=True)(arrays)

    with tracing_for("gpu", 1):
        found = jax.jit(functools.partial(both, kind="cudnn"))(arrays)
    expected = jax.jit(functools.partial(both, kind="xla"))(arrays)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", MASKS)
def test_lengths_that_are_made_even_change_nothing(kind, calls):
    assert_same_values_and_gradients(inputs(jnp.bfloat16), mask_of(kind))
    assert ("cudnn", QUERIES + 1, KEYS + 1) in calls


@pytest.mark.skipif(NO_GPU, reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", MASKS)
def test_cudnn_agrees_with_xla(kind):
    assert_same_values_and_gradients(inputs(jnp.bfloat16, 64), mask_of(kind))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cudnn_is_refused_elsewhere(platform):
    with tracing_for(platform, 1), pytest.raises(UserError, match=f"needs an NVIDIA GPU, .* kind '{platform}'"):
        attend(*inputs(jnp.bfloat16), kind="cudnn")


def test_what_cudnn_cannot_do_is_refused():
    with tracing_for("gpu", 1):
        with pytest.raises(UserError, match="takes bfloat16 or float16, found float32: set config.model.dtype"):
            attend(*inputs(), kind="cudnn")
        with pytest.raises(UserError, match=r"cannot be used for \(2, 6, 2, 12\) queries .*attention='xla'"):
            attend(*inputs(jnp.bfloat16, channels=12), kind="cudnn")  # also where there is no cuDNN


def config_of(variant):
    config = small_config(variant)
    config.data.low_dim = ("state",)
    config.model.dtype, config.model.attention = "bfloat16", "cudnn"
    return config


def test_exact_products_and_cudnn_exclude_each_other():
    config = config_of("uwm")
    config_lib.validate(config)
    config.model.dtype = "float32"
    with pytest.raises(UserError, match="config.model.attention='cudnn' needs config.model.dtype='bfloat16'"):
        config_lib.validate(config)


@pytest.mark.parametrize("variant", SYSTEMS)
def test_a_config_decides_for_all_blocks_of_a_system(variant, calls):
    """Losses with masks of rows without actions, and samples."""
    with tracing_for("gpu", 1):
        system, frozen = synthetic_system(config_of(variant), action_dim=3)
        params = jax.eval_shape(system.init, jax.random.key(0))
        batch = synthetic_batch(system, 2)

        def both(params):
            encoded, draws = system.encode(frozen, batch), system.draws(jax.random.key(0), batch["row"])
            noise = system.noise(jax.random.key(0), batch["row"], system.acting)
            return system.losses(params, encoded, draws), system.sample(params, encoded, system.acting, noise)

        calls.clear()
        jax.eval_shape(both, params)
    assert {kind for kind, *_ in calls} == (set() if variant == "dp_unet" else {"cudnn"})


def test_attention_is_computed_in_one_place():
    package = Path(config_lib.__file__).parent
    calling = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"(?<!scaled_)dot_product_attention\(", file.read_text())
    }
    assert calling == {"models/attention.py"}
