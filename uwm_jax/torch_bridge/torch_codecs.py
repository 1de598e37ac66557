"""Image codecs as PyTorch modules: frames (B, V, T, H, W, 3) in [0, 1] to latents (B, V, T, h, w, C).

They hold what `uwm_jax.codecs` keeps in arrays, under the names of the official state dict
(`obs_encoder.<name>.*`). SDXL's autoencoder is diffusers' own class, imported only when it is made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uwm_jax.errors import UserError

VAE_DIVISOR = 3.0  # the official code's scale on top of the VAE's own


class PixelsCodec(nn.Module):
    """Pixels moved to [-1, 1]."""

    name = "pixels"

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> PixelsCodec:
        return cls()

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """`sample` changes nothing: there is no randomness."""
        return images * 2 - 1


class PCACodec(nn.Module):
    """Principal components of image patches."""

    name = "pca"

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> PCACodec:
        codec = description["codec"]
        return cls(codec["patch"], codec["channels"], len(description["cameras"]), description["images"]["crop"])

    def __init__(self, patch: int, channels: int, views: int, crop: Sequence[int]):
        super().__init__()
        self.patch = patch
        self.register_buffer("mean", torch.zeros(views, *crop, 3))
        self.register_buffer("components", torch.zeros(views, patch * patch * 3, channels))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """`sample` changes nothing: there is no randomness."""
        b, v, t, height, width, _ = images.shape
        p, h, w = self.patch, height // self.patch, width // self.patch
        centred = (images - self.mean[:, None]).reshape(b, v, t, h, p, w, p, 3)
        patches = centred.permute(0, 1, 2, 3, 5, 4, 6, 7).reshape(b, v, t * h * w, -1)
        return (patches @ self.components).reshape(b, v, t, h, w, -1) / self.scale


class VAECodec(nn.Module):
    """Scaled latents of an `AutoencoderKL`: (posterior * scaling_factor - shift) / scale.

    Args:
      diffusers_config: its configuration, as diffusers saves it.
      microbatch: frames in one pass.

    Raises:
      UserError: diffusers is not installed.
    """

    name = "vae"

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> VAECodec:
        return cls(description["codec"]["diffusers_config"], description["config"]["model"]["codec"]["microbatch"])

    def __init__(self, diffusers_config: Mapping[str, Any], microbatch: int):
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError as e:
            raise UserError(
                "the model's image codec needs diffusers, which is not installed: pip install diffusers."
            ) from e
        self.vae, self.microbatch = AutoencoderKL.from_config(dict(diffusers_config)), microbatch
        shape = (1, self.vae.config.latent_channels, 1, 1)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.full(shape, VAE_DIVISOR))

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """`sample` draws from the posterior; otherwise its mode is taken."""
        parts = []
        for frames in images.flatten(0, 2).movedim(-1, 1).split(self.microbatch):
            posterior = self.vae.encode(frames * 2 - 1).latent_dist
            parts.append(posterior.sample() if sample else posterior.mode())
        latents = torch.cat(parts) - (self.vae.config.shift_factor or 0.0)
        latents = (latents * self.vae.config.scaling_factor - self.shift) / self.scale
        return latents.movedim(1, -1).unflatten(0, images.shape[:3])


_CODECS: dict[str, Any] = {codec.name: codec for codec in (PixelsCodec, PCACodec, VAECodec)}
_PACKAGES = {"vae": "diffusers"}  # that a codec needs


def codec_from_description(description: Mapping[str, Any]) -> nn.Module:
    """The codec that the `.json` of a `to-torch` export describes, without its weights.

    Raises:
      UserError: there is no module for it, or a package that it needs is not installed.
    """
    name = description["codec"]["name"]
    if name not in _CODECS:
        raise UserError(f"the codec {name!r} has no PyTorch module; those are {', '.join(_CODECS)}.")
    return _CODECS[name].from_description(description)


def is_available(name: str) -> bool:
    """Whether this machine has the packages that a codec's PyTorch module needs."""
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None
