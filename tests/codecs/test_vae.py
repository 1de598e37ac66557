from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.codecs import VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL


@pytest.fixture(scope="module")
def vae():
    model = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.13025, shift_factor=0.2
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)


def frames(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(*shape, 3)), jnp.float32)


def keys(n: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(n))


@pytest.mark.slow
def test_vae_latents_follow_the_formula(vae):
    model, params = vae
    codec = VAECodec(model)
    x = frames(2, 2, 2, 8, 8)
    mean, logvar = model.apply({"params": params}, x.reshape(8, 8, 8, 3) * 2 - 1, method="encode")
    mean, logvar = (np.asarray(a).reshape(2, 2, 2, 4, 4, 4) for a in (mean, logvar))
    assert codec.latent_shape(2, 2, 8, 8) == (2, 2, 4, 4, 4)

    mode = codec.encode(params, x, None)
    np.testing.assert_allclose(mode, (mean - 0.2) * 0.13025 / 3, atol=1e-6)
    sample = codec.encode(params, x, keys(2))
    noise = np.stack([jax.random.normal(k, mean.shape[1:]) for k in keys(2)])
    np.testing.assert_allclose(sample, (mean + np.exp(0.5 * logvar) * noise - 0.2) * 0.13025 / 3, atol=1e-6)

    image = codec.decode(params, mode)
    expected = model.apply({"params": params}, jnp.asarray(mean.reshape(8, 4, 4, 4)), method="decode")
    np.testing.assert_allclose(image, (np.asarray(expected).reshape(x.shape) + 1) / 2, atol=1e-5)


@pytest.mark.parametrize("microbatch", [1, 5])  # 12 frames: one at a time, and three passes of four
def test_vae_results_do_not_depend_on_the_microbatch(vae, microbatch):
    model, params = vae
    x = frames(3, 2, 2, 8, 8)
    whole, parts = VAECodec(model), VAECodec(model, microbatch=microbatch)
    run = jax.jit(lambda codec, p, x, k: codec.encode(p, x, k), static_argnums=0)
    latents = run(whole, params, x, keys(3))
    np.testing.assert_allclose(run(parts, params, x, keys(3)), latents, atol=1e-6)
    decode = jax.jit(lambda codec, p, z: codec.decode(p, z), static_argnums=0)
    np.testing.assert_allclose(decode(parts, params, latents), decode(whole, params, latents), atol=1e-5)


@pytest.mark.slow
def test_a_ragged_last_microbatch(vae):
    model, params = vae
    x = frames(7, 1, 1, 8, 8)  # a prime number of frames cannot be split evenly
    np.testing.assert_allclose(
        VAECodec(model, microbatch=3).encode(params, x, None), VAECodec(model).encode(params, x, None), atol=1e-6
    )


@pytest.mark.slow
def test_a_rows_sample_is_a_function_of_its_key(vae):
    model, params = vae
    codec = VAECodec(model, microbatch=4)
    x = frames(3, 1, 2, 8, 8)
    together = codec.encode(params, x, keys(3))
    for row in (0, 2):
        alone = codec.encode(params, x[row : row + 1], keys(3)[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-6)
    same = codec.encode(params, jnp.broadcast_to(x[:1], x.shape), keys(3))
    assert np.abs(np.asarray(same[0] - same[1])).max() > 1e-3


def test_sizes_that_do_not_fit_are_refused(vae):
    model, _ = vae
    with pytest.raises(ValueError, match=r"9 x 8 .* 2 pixels \(the VAE's downsampling\)"):
        VAECodec(model).latent_shape(1, 1, 9, 8)
