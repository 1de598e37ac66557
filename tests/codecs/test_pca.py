from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.codecs import PCACodec, fit_pca


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
    codec = PCACodec.from_arrays(params)
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
    codec = PCACodec.from_arrays(params)
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
    codec = PCACodec.from_arrays(params)
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


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the PCA codec's patch"):
        PCACodec(patch=3, channels=2).latent_shape(1, 1, 8, 9)
