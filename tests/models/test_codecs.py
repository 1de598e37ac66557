from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models.codecs import PCACodec, PixelsCodec, VAECodec, fit_pca
from uwm_jax.models.vae import AutoencoderKL


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


def test_pixels_round_trip_is_exact():
    codec = PixelsCodec()
    bytes_ = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 2, 1, 8, 16, 3)
    latents = codec.encode({}, jnp.asarray(bytes_, jnp.float32) / 255, keys(1))
    assert latents.shape[1:] == codec.latent_shape(2, 1, 8, 16) == (2, 1, 8, 16, 3)
    assert float(latents.min()) == -1 and float(latents.max()) == 1
    np.testing.assert_array_equal(np.round(np.asarray(codec.decode({}, latents)) * 255), bytes_)
    grid = jnp.linspace(0, 1, 1025).reshape(1, 1, 1, 1025, 1, 1)  # float32 holds k/1024 and its double exactly
    np.testing.assert_array_equal(codec.decode({}, codec.encode({}, grid, None)), grid)


# --- VAE ---


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
    with pytest.raises(ValueError, match="the PCA codec's patch"):
        PCACodec(patch=3, channels=2).latent_shape(1, 1, 8, 9)


# --- PCA ---


def video(n: int, views: int = 2, height: int = 8, width: int = 12, seed: int = 0) -> np.ndarray:
    """Smooth random frames (N, V, H, W, 3) uint8, of which few components tell most."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(2 * np.pi * (a * y + b * x) + c) for a, b, c in rng.uniform(0, 2, (6, 3))], -1)
    values = np.einsum("nvkc,hwk->nvhwc", rng.normal(size=(n, views, 6, 3)), waves)
    return np.clip(128 + 25 * values + rng.normal(scale=2, size=values.shape), 0, 255).astype(np.uint8)


def patches_of(images: np.ndarray, patch: int) -> np.ndarray:
    """(N, V, H, W, 3) -> (V, N * h * w, patch * patch * 3) by plain loops over the grid."""
    n, v, height, width, _ = images.shape
    cut = [
        [
            images[i, view, r : r + patch, c : c + patch].ravel()
            for i in range(n)
            for r in range(0, height, patch)
            for c in range(0, width, patch)
        ]
        for view in range(v)
    ]
    return np.array(cut)


def test_pca_is_the_principal_subspace_and_has_unit_std():
    raw = video(150)  # more than two pieces of the fit
    params = fit_pca(raw, patch=4, channels=5)
    assert {k: v.shape for k, v in params.items()} == {"mean": (2, 8, 12, 3), "components": (2, 48, 5), "scale": ()}
    assert all(np.asarray(v).dtype == np.float32 for v in params.values())

    centred = raw / 255 - (raw / 255).mean(axis=0)
    patches = patches_of(centred, 4)
    codec = PCACodec.from_params(params)
    assert codec == PCACodec(patch=4, channels=5)
    images = jnp.asarray(raw[:, :, None], jnp.float32) / 255
    latents = np.asarray(codec.encode(params, images, None))
    assert latents.shape[1:] == codec.latent_shape(2, 1, 8, 12) == (2, 1, 2, 3, 5)
    np.testing.assert_allclose(latents.std(), 1, atol=1e-4)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-4)

    decoded = np.asarray(codec.decode(params, jnp.asarray(latents)))
    assert decoded.shape == images.shape
    for view in range(2):  # an independent route to the same subspace: SVD of the patches
        _, _, rows = np.linalg.svd(patches[view], full_matrices=False)
        basis = rows[:5]
        np.testing.assert_allclose(np.abs(params["components"][view].T @ basis.T), np.eye(5), atol=1e-3)
        projected = patches[view] @ basis.T @ basis
        ours = patches_of(decoded[:, view : view + 1, 0] - params["mean"][view], 4)[0]
        np.testing.assert_allclose(ours, projected, atol=2e-5)


def test_pca_of_full_rank_is_lossless():
    raw = video(40)
    params = fit_pca(raw, patch=2, channels=12)
    codec = PCACodec.from_params(params)
    images = jnp.asarray(video(3, seed=5)[:, :, None], jnp.float32) / 255  # other frames than those fitted
    both = jax.jit(lambda p, x: codec.decode(p, codec.encode(p, x, None)))(params, images)
    np.testing.assert_allclose(both, images, atol=3e-6)


def test_pca_is_deterministic_with_positive_leading_entries():
    a, b = (fit_pca(video(30), patch=4, channels=6) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    largest = np.take_along_axis(a["components"], np.abs(a["components"]).argmax(axis=1, keepdims=True), axis=1)
    assert (largest > 0).all()
    np.testing.assert_allclose(a["components"].transpose(0, 2, 1) @ a["components"], [np.eye(6)] * 2, atol=1e-5)


def test_pca_of_frames_that_never_change():
    raw = np.full((4, 1, 4, 4, 3), 7, np.uint8)
    params = fit_pca(raw, patch=2, channels=3)
    assert params["scale"] == 1
    codec = PCACodec.from_params(params)
    latents = codec.encode(params, jnp.asarray(raw[:, :, None], jnp.float32) / 255, None)
    np.testing.assert_allclose(latents, 0, atol=1e-6)
    np.testing.assert_allclose(codec.decode(params, latents), 7 / 255, atol=1e-6)


@pytest.mark.parametrize(
    "raw, patch, channels, message",
    [
        (np.zeros((2, 1, 4, 4, 3), np.float32), 2, 3, "uint8"),
        (np.zeros((0, 1, 4, 4, 3), np.uint8), 2, 3, "N >= 1"),
        (np.zeros((2, 1, 4, 5, 3), np.uint8), 2, 3, "4 x 5"),
        (np.zeros((2, 1, 4, 4, 3), np.uint8), 2, 13, "1 to 12 channels"),
    ],
)
def test_fit_pca_refuses(raw, patch, channels, message):
    with pytest.raises(ValueError, match=message):
        fit_pca(raw, patch, channels)
