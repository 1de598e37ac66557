"""Synthetic systems, data specs and batches from a config alone, for benchmarks and tests: no file is read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax import codecs, systems
from uwm_jax.codecs import Codec
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.systems.base import System

LOW_DIM, TEXT_DIM = 7, 512  # widths of synthetic low-dim keys and text embeddings


def synthetic_system(config: ConfigDict, action_dim: int) -> tuple[System, Any]:
    """A system of the config's shapes and random codec arrays; a VAE is SDXL's."""
    codec, frozen = synthetic_codec(config)
    return systems.make(config, synthetic_spec(config, action_dim), codec), frozen


def synthetic_spec(config: ConfigDict, action_dim: int, frame_size: tuple[int, int] | None = None) -> DataSpec:
    """Data of the config's keys; frames come in `frame_size`, by default the size that they are resized to."""
    return DataSpec(
        window=WindowSpec.from_config(config.data.window),
        cameras=dict.fromkeys(config.data.cameras, frame_size or tuple(config.data.resize)),
        low_dim=dict.fromkeys(config.data.low_dim, LOW_DIM),
        action_dim=action_dim,
        text_dim=TEXT_DIM if config.data.text else 0,
        normalizer=Normalizer(),
    )


def synthetic_codec(config: ConfigDict) -> tuple[Codec | None, Any]:
    """The config's codec with random arrays; (None, {}) for a config without one."""
    codec = codecs.from_config(config)
    return codec, synthetic_arrays(config, codec)


def synthetic_arrays(config: ConfigDict, codec: Codec | None) -> Any:
    """Random arrays of a codec, {} for None."""
    return {} if codec is None else codec.synthetic_arrays(len(config.data.cameras), *config.data.crop)


def synthetic_batch(system: System, batch_size: int) -> dict[str, jax.Array]:
    """Random pixels and numbers in the shapes of `DataSpec.batch_like`; actions in all rows."""
    rng = np.random.default_rng(0)

    def fill(like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, like.shape, np.uint8))
        if like.dtype == jnp.float32:
            return jnp.asarray(rng.uniform(-1, 1, like.shape).astype(np.float32))
        return jnp.ones(like.shape, like.dtype)

    batch = {key: fill(like) for key, like in system.spec.batch_like(batch_size).items()}
    return batch | {"row": jnp.arange(batch_size, dtype=jnp.int32)}
