"""Pixels as latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.codecs.base import Codec, LatentShape


@dataclasses.dataclass(frozen=True)
class PixelsCodec(Codec):
    """Pixels moved to [-1, 1]; has no parameters and no randomness."""

    name = "pixels"

    @classmethod
    def from_config(cls, fields: ConfigDict) -> PixelsCodec:
        return cls()

    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, H, W, 3)."""
        return num_views, num_frames, height, width, 3

    def encode(self, params: Any, frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """(B, V, T, H, W, 3) in [0, 1] -> the same shape in [-1, 1]; `params` and `rng` are not used."""
        return frames.astype(jnp.float32) * 2 - 1

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Inverse of `encode`."""
        return (latents.astype(jnp.float32) + 1) / 2

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "latents": "images * 2 - 1"}
