"""Latents of a frozen variational autoencoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.codecs.base import Codec, LatentShape, grid, sample_posterior
from uwm_jax.models.activations import axes_for, constrain, lay_out


@dataclasses.dataclass(frozen=True)
class VAECodec(Codec):
    """Latents of a variational autoencoder: (posterior - shift) * scaling / divisor.

    The samplers clip predicted latents to [-1, 1]; after the divisor, their standard deviation is about 1/3.

    Attributes:
        vae: the module; `params` of the methods are its parameters.
        microbatch: frames in one pass through the VAE, on each device: bounds memory, changes no result. Each device
            works on its own share of the frames in every pass; devices that share a row have frames of it each.
        divisor: the official code's extra scale.
    """

    vae: AutoencoderKL
    microbatch: int = 72
    divisor: float = 3.0

    name = "vae"
    pretrained = True
    latent_rms = 1 / 3
    has_posterior = True

    @classmethod
    def from_config(cls, fields: ConfigDict) -> VAECodec:
        return cls(AutoencoderKL(dtype=jnp.dtype(fields.dtype)), microbatch=fields.microbatch)

    @classmethod
    def of_widths(cls, widths: tuple[int, ...], norm_num_groups: int) -> VAECodec:
        """One of another size than SDXL's, with so many channels on each of its levels, for benchmarks."""
        return cls(AutoencoderKL(block_out_channels=widths, norm_num_groups=norm_num_groups))

    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, h, w, C) of the latents of `num_frames` frames of `num_views` views of `height` x `width`."""
        h, w = grid(height, width, self.vae.downsampling, "the VAE's downsampling")
        return num_views, num_frames, h, w, self.vae.latent_channels

    def encode(self, params: Any, frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Latents of frames.

        Args:
            params: the VAE's parameters.
            frames: (B, V, T, H, W, 3) float in [0, 1].
            rng: (B,) keys, one per row: latents are a sample of the posterior, and a row's sample depends on its key
                alone; None: the posterior's mode.
        """
        mean, logvar = self._posterior(params, frames)
        return self._scaled(mean if rng is None else sample_posterior(mean, logvar, rng))

    def moments(self, params: Any, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean and the logarithm of the variance of latents, in units of latents."""
        mean, logvar = self._posterior(params, frames)
        return self._scaled(mean), logvar + 2 * math.log(self.vae.scaling_factor / self.divisor)

    def _posterior(self, params: Any, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and logarithm of the variance of what the VAE makes of frames."""

        def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.vae.apply({"params": params}, x * 2 - 1, method="encode")

        return _in_passes(moments, frames, self.microbatch)

    def _scaled(self, z: jax.Array) -> jax.Array:
        return (z - self.vae.shift_factor) * self.vae.scaling_factor / self.divisor

    def encoder_arrays(self, params: Any) -> Any:
        return {name: params[name] for name in ("encoder", "quant_conv") if name in params}

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """(B, V, T, h, w, C) -> (B, V, T, H, W, 3) float32, [0, 1] up to the VAE's overshoot."""

        def images(z: jax.Array) -> jax.Array:
            z = z * self.divisor / self.vae.scaling_factor + self.vae.shift_factor
            return (self.vae.apply({"params": params}, z, method="decode") + 1) / 2

        return _in_passes(images, latents, self.microbatch)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.vae.dtype)

    def encode_flops(self, num_frames: int, height: int, width: int) -> float:
        return num_frames * self.vae.encode_flops(height, width)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "latents": "(mode of the posterior of images * 2 - 1, minus shift_factor) * scaling_factor / divisor",
            "scaling_factor": self.vae.scaling_factor,
            "shift_factor": self.vae.shift_factor,
            "divisor": self.divisor,
            "diffusers_config": self.vae.diffusers_config(),
        }

    def synthetic_arrays(self, num_views: int, height: int, width: int) -> Any:
        """The autoencoder's parameters at initialisation."""
        image = jnp.zeros((1, self.vae.downsampling, self.vae.downsampling, 3))
        return jax.jit(self.vae.init)(jax.random.key(0), image)["params"]


def _in_passes(function: Callable, x: jax.Array, microbatch: int) -> Any:
    """Applies `function` to the flattened leading (B, V, T) of x, at most `microbatch` items of a device at a time.

    The items are spread over all devices, those that share a row (`tensor`) too; the results lie as rows of a batch do.
    """
    # Both ends are held to the rows of the batch, or the layout would spread to what comes before and after.
    lead, x = x.shape[:3], constrain(x, "batch").reshape(-1, *x.shape[3:])
    count = len(x)
    spread, devices, padded = axes_for(count)
    x = lay_out(_pad(x, 0, padded), spread)
    items = padded // devices  # of each device
    passes = -(-items // microbatch)
    # an exact division needs no padding, so a few passes more are a good price for it
    passes = next((p for p in range(passes, min(2 * passes, items) + 1) if items % p == 0), passes)
    size = -(-items // passes)

    def back(y: jax.Array) -> jax.Array:
        return constrain(y[:count].reshape(*lead, *y.shape[1:]), "batch")

    if passes == 1:
        return jax.tree.map(back, function(x))
    x = _pad(x.reshape(devices, items, *x.shape[1:]), 1, size * passes)
    # pass j takes items j, j + passes, ... of every device, so that no item ever moves to another one
    x = x.reshape(devices * size, passes, *x.shape[2:]).swapaxes(0, 1)
    y = jax.lax.map(lambda part: function(lay_out(part, spread)), x)

    def in_order(y: jax.Array) -> jax.Array:
        y = y.swapaxes(0, 1).reshape(devices, size * passes, *y.shape[2:])[:, :items]
        return back(y.reshape(-1, *y.shape[2:]))

    return jax.tree.map(in_order, y)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    """`x` with zeros behind its own items along `axis`, `length` in sum."""
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])
