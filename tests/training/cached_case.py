"""A dataset with two cameras, a small VAE with random weights, and configs that train from their frames or latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from tests.systems.small import small_config
from uwm_jax import config as config_lib
from uwm_jax.data.loader import Loader
from uwm_jax.data.run_data import RunData
from uwm_jax.torch_bridge import diffusers_vae
from uwm_jax.training import cached_latents

VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
STILL = {"random_crop": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def write_vae(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder."""
    module = diffusers_vae.module_from_config(VAE)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, like in traverse_util.flatten_dict(shapes).items():
        scale = 0.5 / np.sqrt(max(like.size // like.shape[-1], 1))
        value = rng.normal(scale=scale, size=like.shape).astype(np.float32)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        tensors[diffusers_vae._torch_name(path)] = value.transpose(axes) if axes else value
    diffusers_vae.write_folder(folder, VAE, tensors)
    return folder


def config_of(variant: str, dataset: Path, vae: Path, *, augmented: bool) -> ConfigDict:
    """A small run on `tiny_dataset`'s two cameras."""
    c = small_config(variant)
    c.data.path, c.data.cameras, c.data.val_ratio = str(dataset), ("wrist", "exterior"), 0.3
    c.data.low_dim, c.data.num_streams = ("state",), 4
    c.data.action = (("action", "identity"),)
    c.data.resize, c.data.crop = (18, 20), (16, 16)
    if not augmented:
        c.data.augment.update(STILL)
    c.model.depth = 1
    c.model.codec.name, c.model.codec.vae, c.model.codec.posterior = "vae", str(vae), "mode"
    c.model.codec.microbatch = 14
    config_lib.validate(c)
    return c


def from_latents(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.latents = "vae"
    config_lib.validate(config)
    return config


@contextlib.contextmanager
def opened(config: ConfigDict) -> Iterator[Loader]:
    """The loader of a run."""
    data = RunData(config.data, seed=3, latents=cached_latents.use_of(config))
    with contextlib.closing(data):
        yield Loader(data, batch_size=config.batch_size)


def batches(config: ConfigDict, count: int) -> list[dict[str, Any]]:
    """The first batches of a run."""
    with opened(config) as loader:
        iterator = iter(loader)
        return [next(iterator) for _ in range(count)]
