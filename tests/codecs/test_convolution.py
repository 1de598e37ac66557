"""Winograd's form of a convolution against XLA's convolution in double precision, and where it is used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from uwm_jax.codecs import convolution
from uwm_jax.codecs.convolution import convolution as conv

OPTIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": jax.lax.Precision.HIGHEST}


def ours(x, kernel):
    return conv(x, kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS)


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS)


def with_gradients(f):
    def run(x, kernel, gradient):
        y, vjp = jax.vjp(f, x, kernel)
        return (y, *vjp(gradient))

    return run


def arrays(shape, outputs, seed=0):
    rng = np.random.default_rng(seed)
    sizes = (shape, (3, 3, shape[-1], outputs), (*shape[:-1], outputs))
    return [rng.normal(size=size).astype(np.float32) for size in sizes]


def distances(found, expected):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("strip_bytes", [1 << 30, 1 << 17])  # one strip, and several with a remainder
@pytest.mark.parametrize("outputs", [32, 40])  # in place of the inputs, and apart
def test_equals_plain_convolution(monkeypatch, strip_bytes, outputs):
    monkeypatch.setattr(convolution, "STRIP_BYTES", strip_bytes)
    args = arrays((2, 18, 13, 32), outputs)
    with jax.enable_x64():
        exact = [np.asarray(a) for a in jax.jit(with_gradients(plain))(*(np.float64(a) for a in args))]
    assert "36,32," in jax.jit(ours).lower(*args[:2]).as_text().replace("x", ",")  # the transformed kernel
    found = jax.jit(with_gradients(ours))(*args)
    assert max(distances(found, exact)) < 1e-6
    mapped = jax.jit(jax.checkpoint(jax.vmap(with_gradients(ours), in_axes=(0, None, 0))))(
        *(np.stack([a, a[::-1]]) if i != 1 else a for i, a in enumerate(args))
    )
    assert max(distances([a[0] for a in mapped], exact)) < 1e-6
    assert max(distances([mapped[0][1][::-1]], exact[:1])) < 1e-6


def test_under_shard_map():
    args = arrays((2, 16, 16, 32), 32)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def summed(x, kernel, gradient):
        y, of_x, of_kernel = with_gradients(ours)(x, kernel, gradient)
        return y, of_x, jax.lax.psum(of_kernel, "data")

    mapped = jax.shard_map(
        summed, mesh=mesh, in_specs=(split, whole, split), out_specs=(split, split, whole), check_vma=False
    )
    for a, b in zip(jax.jit(mapped)(*args), jax.jit(with_gradients(plain))(*args), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_where_the_compiler_divides_axes_the_program_is_the_plain_one():
    x, kernel, _ = arrays((2, 16, 16, 32), 32)

    def primitives():
        return [e.primitive.name for e in jax.make_jaxpr(ours)(x, kernel).jaxpr.eqns]

    assert "conv_general_dilated" not in primitives()
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        assert primitives() == ["conv_general_dilated"]


@pytest.mark.parametrize("why", ["accelerator", "few channels", "stride", "bfloat16", "few tiles", "kernel of one"])
def test_elsewhere_the_program_is_the_plain_one(monkeypatch, why):
    x, kernel, _ = arrays((1, 16, 16, 32), 32)
    strides = (1, 1)
    if why == "accelerator":
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    elif why == "few channels":
        x, kernel = x[..., :16], kernel[:, :, :16]
    elif why == "stride":
        strides = (2, 2)
    elif why == "bfloat16":
        x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    elif why == "few tiles":
        x = x[:, :8]
    else:
        kernel = kernel[:1, :1]
    text = jax.jit(lambda x, k: conv(x, k, strides, ((1, 1), (1, 1)), **OPTIONS)).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 1 and "dot_general" not in text
