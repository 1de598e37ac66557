"""Synthetic systems, data facts and batches from a config alone, for benchmarks and tests: no file is read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec, PCACodec, PixelsCodec, VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.data.normalize import Normalizer
from uwm_jax.systems.uwm.system import DataFacts, System

LOW_DIM, TEXT_DIM = 7, 512  # widths of synthetic low-dim keys and text embeddings
PCA_PATCH, PCA_CHANNELS = 8, 12


def synthetic_system(config: ConfigDict, action_dim: int) -> tuple[System, Any]:
    """A system of the config's shapes and random codec arrays; a VAE is SDXL's."""
    codec, frozen = synthetic_codec(config)
    return System(config, synthetic_facts(config, action_dim), codec), frozen


def synthetic_facts(config: ConfigDict, action_dim: int, frame_size: tuple[int, int] | None = None) -> DataFacts:
    """Data of the config's keys; frames come in `frame_size`, by default the size that they are resized to."""
    return DataFacts(
        cameras=dict.fromkeys(config.data.cameras, frame_size or tuple(config.data.resize)),
        low_dim=dict.fromkeys(config.data.low_dim, LOW_DIM),
        action_dim=action_dim,
        text_dim=TEXT_DIM if config.data.text else 0,
        normalizer=Normalizer(),
    )


def synthetic_codec(config: ConfigDict) -> tuple[Codec, Any]:
    """The config's codec with random arrays."""
    codec = make_codec(config)
    return codec, synthetic_arrays(config, codec)


def make_codec(config: ConfigDict) -> Codec:
    """The config's codec without its arrays; a VAE is SDXL's."""
    if config.model.codec.name == "pixels":
        return PixelsCodec()
    if config.model.codec.name == "pca":
        return PCACodec(PCA_PATCH, PCA_CHANNELS)
    return VAECodec(AutoencoderKL(dtype=jnp.dtype(config.model.codec.dtype)), microbatch=config.model.codec.microbatch)


def synthetic_arrays(config: ConfigDict, codec: Codec) -> Any:
    """Random arrays of a codec that `make_codec` made."""
    if isinstance(codec, PixelsCodec):
        return {}
    if isinstance(codec, PCACodec):
        views, size = len(config.data.cameras), PCA_PATCH * PCA_PATCH * 3
        components = np.linalg.qr(np.random.default_rng(0).normal(size=(views, size, PCA_CHANNELS)))[0]
        mean = np.full((views, *config.data.crop, 3), 0.5)
        arrays = {"mean": mean, "components": components, "scale": np.ones(())}
        return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
    image = jnp.zeros((1, codec.vae.downsampling, codec.vae.downsampling, 3))
    return jax.jit(codec.vae.init)(jax.random.key(0), image)["params"]


def synthetic_batch(system: System, batch_size: int) -> dict[str, jax.Array]:
    """Random pixels and numbers in the shapes of `System.example_batch`."""
    rng = np.random.default_rng(0)

    def fill(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, x.shape, np.uint8))
        if x.dtype == jnp.float32:
            return jnp.asarray(rng.uniform(-1, 1, x.shape).astype(np.float32))
        return x

    return {name: fill(x) for name, x in system.example_batch(batch_size).items()}
