"""Latents of a linear autoencoder of patches, which principal components of training frames define."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.codecs.base import Codec, LatentShape, grid
from uwm_jax.models import flops

PATCH, CHANNELS = 8, 12  # of data_prep.reshard by default


@dataclasses.dataclass(frozen=True)
class PCACodec(Codec):
    """Principal components of image patches: linear, orthonormal, centred on each view's mean image.

    `params` of the methods is what `fit_pca` returns. Latent (i, j) of a frame holds the patch of rows
    [i*patch, (i+1)*patch) and columns [j*patch, (j+1)*patch), flattened as (row, column, colour).
    """

    patch: int
    channels: int

    name = "pca"
    arrays = {"mean": ("view", "row", "column", "colour"), "components": ("view", "pixel", "channel"), "scale": ()}
    clip = 20.0  # latents have unit standard deviation and long tails
    smallest_clip = 4.0
    latent_rms = 1.0

    @classmethod
    def from_config(cls, fields: ConfigDict) -> PCACodec:
        return cls(PATCH, CHANNELS)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> PCACodec:
        _, size, channels = arrays["components"].shape
        return cls(patch=math.isqrt(size // 3), channels=channels)

    @classmethod
    def fitted_on(cls, arrays: Mapping[str, Any]) -> tuple[int, int, int]:
        views, height, width, _ = arrays["mean"].shape
        return views, height, width

    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, H/patch, W/patch, channels)."""
        h, w = grid(height, width, self.patch, "the PCA codec's patch")
        return num_views, num_frames, h, w, self.channels

    def encode(self, params: Mapping[str, jax.Array], frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """(B, V, T, H, W, 3) in [0, 1] -> (B, V, T, h, w, channels); there is no randomness to use `rng` for."""
        b, v, t, height, width, _ = frames.shape
        h, w = grid(height, width, self.patch, "the PCA codec's patch")
        centred = frames.astype(jnp.float32) - params["mean"][:, None]
        patches = centred.reshape(b, v, t, h, self.patch, w, self.patch, 3)
        components = params["components"].reshape(v, self.patch, self.patch, 3, self.channels)
        latents = jnp.einsum("bvthpwqc,vpqck->bvthwk", patches, components, precision=jax.lax.Precision.HIGHEST)
        return latents / params["scale"]

    def decode(self, params: Mapping[str, jax.Array], latents: jax.Array) -> jax.Array:
        """(B, V, T, h, w, channels) -> (B, V, T, H, W, 3), the transpose of `encode`'s projection."""
        b, v, t, h, w, _ = latents.shape
        components = params["components"].reshape(v, self.patch, self.patch, 3, self.channels)
        patches = jnp.einsum(
            "bvthwk,vpqck->bvthpwqc",
            latents.astype(jnp.float32) * params["scale"],
            components,
            precision=jax.lax.Precision.HIGHEST,
        )
        return patches.reshape(b, v, t, h * self.patch, w * self.patch, 3) + params["mean"][:, None]

    def encode_flops(self, num_frames: int, height: int, width: int) -> float:
        positions = num_frames * (height // self.patch) * (width // self.patch)
        return flops.dense(self.patch**2 * 3, self.channels, positions)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "latents": "patches (row, column, colour) of images - mean, times components / scale",
            "patch": self.patch,
            "channels": self.channels,
        }

    def synthetic_arrays(self, num_views: int, height: int, width: int) -> dict[str, jax.Array]:
        """Grey mean images and random orthonormal components."""
        size = self.patch * self.patch * 3
        components = np.linalg.qr(np.random.default_rng(0).normal(size=(num_views, size, self.channels)))[0]
        arrays = {"mean": np.full((num_views, height, width, 3), 0.5), "components": components, "scale": np.ones(())}
        return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}


def fit_pca(frames: np.ndarray, patch: int, channels: int) -> dict[str, np.ndarray]:
    """Parameters of a `PCACodec`, by exact PCA of all patches of each view.

    Args:
        frames: (N, V, H, W, 3) uint8, from training episodes only, at the size the model sees.
        patch: side of a patch in pixels; divides H and W.
        channels: components kept, at most patch * patch * 3.
    Returns:
        float32 arrays {"mean": (V, H, W, 3) mean image in [0, 1]; "components": (V, patch*patch*3, channels),
        orthonormal columns by falling variance, each with its largest entry positive; "scale": (), the
        standard deviation over all latents of `frames` before division}.
    Raises:
        ValueError: frames of another kind, or a patch or channels that do not fit.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected frames (N >= 1, V, H, W, 3) uint8, found {frames.shape} {frames.dtype}")
    n, v, height, width, _ = frames.shape
    h, w = grid(height, width, patch, "the PCA codec's patch")
    size = patch * patch * 3
    if not 1 <= channels <= size:
        raise ValueError(f"expected 1 to {size} channels for patches of {patch} x {patch}, found {channels}")

    mean = np.mean(frames, axis=0, dtype=np.float64) / 255
    covariance = np.zeros((v, size, size))
    for start in range(0, n, 64):  # pieces, so that no float copy of the frames is made
        piece = frames[start : start + 64].astype(np.float64) / 255 - mean
        piece = piece.reshape(-1, v, h, patch, w, patch, 3).transpose(1, 0, 2, 4, 3, 5, 6).reshape(v, -1, size)
        covariance += piece.transpose(0, 2, 1) @ piece
    variances, vectors = np.linalg.eigh(covariance / (n * h * w))  # rising order
    variances, vectors = variances[:, ::-1][:, :channels], vectors[:, :, ::-1][:, :, :channels]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1, keepdims=True), axis=1)
    vectors = vectors * np.where(largest < 0, -1.0, 1.0)
    scale = np.sqrt(max(variances.mean(), 0.0))
    return {
        "mean": np.asarray(mean, np.float32),
        "components": vectors.astype(np.float32),
        "scale": np.asarray(scale if scale > 1e-6 else 1.0, np.float32),  # frames that never change have zero latents
    }
