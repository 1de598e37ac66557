"""The autoencoder against numbers of the official code and against diffusers' torch model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.codecs.autoencoder_kl import AutoencoderKL

TINY = dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=3, norm_num_groups=8)


def apply(model: AutoencoderKL, params, x: np.ndarray, method: str):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def random_params(model: AutoencoderKL):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def u(n: int, k: int) -> np.ndarray:
    """The formula that fills weights and inputs of the official reference run."""
    x = 43758.5453 * np.sin(12.9898 * np.arange(1, n + 1, dtype=np.float64) + 78.233 * (k + 1))
    return x - np.floor(x) - 0.5


def filled(shape: tuple[int, ...], k: int) -> np.ndarray:
    return (2.0 * u(int(np.prod(shape)), k)).astype(np.float32).reshape(shape)


def registration_order(levels: tuple[int, ...], layers: int) -> list[str]:
    """diffusers' modules with parameters, in the order in which its constructors register them."""
    names = []

    def resnet(prefix: str, shortcut: bool) -> None:
        names.extend(f"{prefix}.{part}" for part in ("norm1", "conv1", "norm2", "conv2"))
        if shortcut:
            names.append(f"{prefix}.conv_shortcut")

    def pyramid(prefix: str, widths: list[int], layers: int, sampler: str) -> None:
        before = widths[0]
        for i, width in enumerate(widths):
            for j in range(layers):
                resnet(f"{prefix}.{i}.resnets.{j}", shortcut=before != width)
                before = width
            if i + 1 < len(widths):
                names.append(f"{prefix}.{i}.{sampler}.0.conv")

    def middle(prefix: str) -> None:
        names.extend(f"{prefix}.attentions.0.{part}" for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"))
        for i in range(2):
            resnet(f"{prefix}.resnets.{i}", shortcut=False)

    names.append("encoder.conv_in")
    pyramid("encoder.down_blocks", list(levels), layers, "downsamplers")
    middle("encoder.mid_block")
    names += ["encoder.conv_norm_out", "encoder.conv_out", "decoder.conv_in"]
    pyramid("decoder.up_blocks", list(levels)[::-1], layers + 1, "upsamplers")
    middle("decoder.mid_block")
    return names + ["decoder.conv_norm_out", "decoder.conv_out", "quant_conv", "post_quant_conv"]


@pytest.mark.slow
def test_sdxl_equals_the_official_numbers():
    model = AutoencoderKL()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    names = registration_order(model.block_out_channels, model.layers_per_block)
    assert len(names) == 124
    params: dict = {}
    for index, name in enumerate(names):
        path = [*name.replace("to_out.0", "to_out_0").replace("attentions.0", "attentions_0").split(".")]
        joined: list[str] = []  # "down_blocks", "0" -> "down_blocks_0"
        for part in path:
            if part.isdigit():
                joined[-1] += f"_{part}"
            else:
                joined.append(part)
        leaf, node = shapes, params
        for part in joined:
            leaf = leaf[part]
            node = node.setdefault(part, {})
        kernel = "kernel" if "kernel" in leaf else "scale"
        for offset, key in enumerate((kernel, "bias")):
            shape = leaf[key].shape
            values = (0.1 * u(int(np.prod(shape)), 2 * index + offset)).astype(np.float32)
            if key == "kernel" and len(shape) == 4:
                node[key] = values.reshape(shape[3], shape[2], *shape[:2]).transpose(2, 3, 1, 0)
            elif key == "kernel":
                node[key] = values.reshape(shape[::-1]).T
            else:
                node[key] = values + np.float32(key == "scale")
    assert sum(x.size for x in jax.tree.leaves(params)) == 83_653_863
    assert jax.tree.structure(params) == jax.tree.structure(shapes)

    mean, logvar = apply(model, params, channels_last(filled((1, 3, 32, 32), 2007)), "encode")
    image = apply(model, params, channels_last(filled((1, 4, 4, 4), 2009)), "decode")
    for ours, expected_mean, expected_std, first in (
        (mean, 0.0075472, 0.0631778, [-0.092928, 0.126302, -0.02444]),
        (logvar, 0.0214877, 0.0861973, [-0.033006, 0.030585, -0.048257]),
        (image, 0.2457907, 0.4378828, [-0.211999, -0.305863, -0.406566]),
    ):
        ours = np.moveaxis(np.asarray(ours), -1, 1)
        np.testing.assert_allclose([ours.mean(), ours.std()], [expected_mean, expected_std], atol=2e-6)
        np.testing.assert_allclose(ours.ravel()[:3], first, atol=2e-6)


def test_logvar_is_clamped():
    model = AutoencoderKL(**TINY)
    params = random_params(model)
    params["quant_conv"]["bias"] = jnp.array([0.0, 0.0, 0.0, 1e3, -1e3, 0.0])
    _, logvar = apply(model, params, np.zeros((1, 8, 8, 3), np.float32), "encode")
    assert float(logvar[..., 0].min()) == 20 and float(logvar[..., 1].max()) == -30


def test_bfloat16_is_near_float32_and_returns_float32():
    model = AutoencoderKL(**TINY)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    params = random_params(model)
    half = model.clone(dtype=jnp.bfloat16)
    for method, value in (("encode", x), ("decode", x[:, :4, :4])):
        exact = jax.tree.leaves(apply(model, params, value, method))
        rough = jax.tree.leaves(apply(half, params, value, method))
        for a, b in zip(exact, rough, strict=True):
            assert b.dtype == jnp.float32
            assert 0 < np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)
