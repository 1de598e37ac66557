"""Image codecs: they turn frames into the latents that a model predicts, and back.

`Codec` (`base.py`) says what a codec is; the registry finds one by `config.model.codec.name`:

- `VAECodec`: a frozen `AutoencoderKL` (UWM, arXiv:2504.02792, uses SDXL's);
- `PixelsCodec`: the pixels themselves;
- `PCACodec`: a linear autoencoder of patches, fitted in seconds by `fit_pca`.

Frames are (B, V, T, H, W, 3) float32 in [0, 1], latents (B, V, T, h, w, C) float32 with most values in
[-1, 1] (VAE, pixels) or of unit standard deviation (PCA). Decoded frames are float32 and not clipped. Reading and
keeping a codec's arrays is the business of `uwm_jax.training.codec_store`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from uwm_jax.codecs.base import Codec, sample_posterior
from uwm_jax.codecs.pca import PCACodec, fit_pca
from uwm_jax.codecs.pixels import PixelsCodec
from uwm_jax.codecs.vae import VAECodec
from uwm_jax.errors import UserError, suggest

__all__ = ["Codec", "PCACodec", "PixelsCodec", "VAECodec", "fit_pca", "sample_posterior"]

_CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (VAECodec, PixelsCodec, PCACodec)}


def register(codec: type[Codec]) -> type[Codec]:
    """Adds a codec, or replaces the one of its name."""
    _CODECS[codec.name] = codec
    return codec


def names() -> tuple[str, ...]:
    """The names of all codecs."""
    return tuple(_CODECS)


def get(name: str) -> type[Codec]:
    """The class of the codec called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in _CODECS:
        choices = ", ".join(_CODECS)
        raise UserError(f"config.model.codec.name={name!r}: expected one of {choices}.{suggest(name, _CODECS)}")
    return _CODECS[name]


def of_config(config: ConfigDict) -> type[Codec] | None:
    """The class of the config's codec; None for a config without `model.codec`."""
    codec = config.model.get("codec")
    return None if codec is None else get(codec.name)


def from_config(config: ConfigDict) -> Codec | None:
    """The config's codec as far as the config describes it, for programs that need no trained arrays.

    A VAE is SDXL's, and a fitted codec has the size that the data jobs give it by default. None for a config without
    `model.codec`.
    """
    codec = of_config(config)
    return None if codec is None else codec.from_config(config.model.codec)


def fields() -> ConfigDict:
    """The fields of `config.model.codec`, for the configs of systems that have one."""
    c = ConfigDict()
    c.name = "vae"  # image codec: vae, pixels, pca
    c.vae = "stabilityai/sdxl-vae"  # weights of the VAE: diffusers folder or hub name[@revision]
    c.microbatch = 72  # frames per pass through the VAE, on each device
    c.posterior = "sample"  # latents of the VAE in training: sample (official) of the posterior, or its mode
    c.dtype = "float32"  # of the VAE; bfloat16 keeps GroupNorm in fp32
    return c
