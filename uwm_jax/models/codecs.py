"""Image codecs: what turns frames into the latents that the model predicts, and back.

Three of them share one interface (`latent_shape`, `encode`, `decode`) and keep their arrays outside, so that
the arrays travel with the checkpoint and never become constants of a compiled step:

- `VAECodec`: a frozen `AutoencoderKL` (UWM, arXiv:2504.02792, uses SDXL's);
- `PixelsCodec`: the pixels themselves;
- `PCACodec`: a linear autoencoder of patches, fitted in seconds by `fit_pca`.

Frames are (B, V, T, H, W, 3) float32 in [0, 1], latents (B, V, T, h, w, C) float32 with most values in
[-1, 1] (VAE, pixels) or of unit standard deviation (PCA). Decoded frames are float32 and not clipped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models.activations import axes
from uwm_jax.models.vae import AutoencoderKL

LatentShape = tuple[int, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class VAECodec:
    """Latents of a variational autoencoder: (posterior - shift) * scaling / divisor.

    The samplers clip predicted latents to [-1, 1]; after the divisor, their standard deviation is about 1/3.

    Attributes:
        vae: the module; `params` of the methods are its parameters.
        microbatch: frames in one pass through the VAE, on each device: bounds memory, changes no result. A batch
            that is spread over devices stays where it is: each device works on its own frames in every pass.
        divisor: the official code's extra scale.
    """

    vae: AutoencoderKL
    microbatch: int = 72
    divisor: float = 3.0

    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, h, w, C) of the latents of `num_frames` frames of `num_views` views of `height` x `width`."""
        h, w = _grid(height, width, self.vae.downsampling, "the VAE's downsampling")
        return num_views, num_frames, h, w, self.vae.latent_channels

    def encode(self, params: Any, frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Latents of frames.

        Args:
            params: the VAE's parameters.
            frames: (B, V, T, H, W, 3) float in [0, 1].
            rng: (B,) keys, one per row: latents are a sample of the posterior, and a row's sample depends on its key
                alone; None: the posterior's mode.
        """

        def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.vae.apply({"params": params}, x * 2 - 1, method="encode")

        mean, logvar = _in_passes(moments, frames, self.microbatch)
        if rng is not None:
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(rng)
            mean = mean + jnp.exp(0.5 * logvar) * noise
        return (mean - self.vae.shift_factor) * self.vae.scaling_factor / self.divisor

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """(B, V, T, h, w, C) -> (B, V, T, H, W, 3) float32, [0, 1] up to the VAE's overshoot."""

        def images(z: jax.Array) -> jax.Array:
            z = z * self.divisor / self.vae.scaling_factor + self.vae.shift_factor
            return (self.vae.apply({"params": params}, z, method="decode") + 1) / 2

        return _in_passes(images, latents, self.microbatch)


@dataclasses.dataclass(frozen=True)
class PixelsCodec:
    """Pixels moved to [-1, 1]; has no parameters and no randomness."""

    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, H, W, 3)."""
        return num_views, num_frames, height, width, 3

    def encode(self, params: Any, frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """(B, V, T, H, W, 3) in [0, 1] -> the same shape in [-1, 1]; `params` and `rng` are not used."""
        return frames.astype(jnp.float32) * 2 - 1

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Inverse of `encode`."""
        return (latents.astype(jnp.float32) + 1) / 2


@dataclasses.dataclass(frozen=True)
class PCACodec:
    """Principal components of image patches: linear, orthonormal, centred on each view's mean image.

    `params` of the methods is what `fit_pca` returns. Latent (i, j) of a frame holds the patch of rows
    [i*patch, (i+1)*patch) and columns [j*patch, (j+1)*patch), flattened as (row, column, colour).
    """

    patch: int
    channels: int

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> PCACodec:
        """The codec that parameters of `fit_pca` belong to."""
        _, size, channels = params["components"].shape
        return cls(patch=math.isqrt(size // 3), channels=channels)

    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, H/patch, W/patch, channels)."""
        h, w = _grid(height, width, self.patch, "the PCA codec's patch")
        return num_views, num_frames, h, w, self.channels

    def encode(self, params: Mapping[str, jax.Array], frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """(B, V, T, H, W, 3) in [0, 1] -> (B, V, T, h, w, channels); there is no randomness to use `rng` for."""
        b, v, t, height, width, _ = frames.shape
        h, w = _grid(height, width, self.patch, "the PCA codec's patch")
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


Codec = VAECodec | PixelsCodec | PCACodec


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
    h, w = _grid(height, width, patch, "the PCA codec's patch")
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


def _grid(height: int, width: int, step: int, what: str) -> tuple[int, int]:
    if height % step or width % step:
        raise ValueError(f"images of {height} x {width} cannot be cut into steps of {step} pixels ({what})")
    return height // step, width // step


def _in_passes(function: Callable, x: jax.Array, microbatch: int) -> Any:
    """Applies `function` to the flattened leading (B, V, T) of x, at most `microbatch` items of a device at a time."""
    lead, (_, devices) = x.shape[:3], axes("batch")
    if lead[0] % devices:  # such rows are not spread over devices
        devices = 1
    items = lead[0] * lead[1] * lead[2] // devices  # of each device
    passes = -(-items // microbatch)
    # an exact division needs no padding, so a few passes more are a good price for it
    passes = next((p for p in range(passes, min(2 * passes, items) + 1) if items % p == 0), passes)
    size = -(-items // passes)
    if passes == 1:
        return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), function(x.reshape(-1, *x.shape[3:])))
    x = x.reshape(devices, items, *x.shape[3:])
    x = jnp.pad(x, [(0, 0), (0, size * passes - items)] + [(0, 0)] * (x.ndim - 2))
    # pass j takes items j, j + passes, ... of every device, so that no item ever moves to another one
    x = x.reshape(devices * size, passes, *x.shape[2:]).swapaxes(0, 1)
    y = jax.lax.map(function, x)

    def in_order(y: jax.Array) -> jax.Array:
        y = y.swapaxes(0, 1).reshape(devices, size * passes, *y.shape[2:])[:, :items]
        return y.reshape(*lead, *y.shape[2:])

    return jax.tree.map(in_order, y)
