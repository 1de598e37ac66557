"""Where the frozen codec of a run comes from, and where it is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.errors import UserError
from uwm_jax.models.codecs import Codec, PCACodec, PixelsCodec, VAECodec
from uwm_jax.parallel import distributed
from uwm_jax.torch_bridge import diffusers_vae


def for_new_run(config: ConfigDict, workdir: str | os.PathLike[str], fitted: Any) -> tuple[Codec, Any]:
    """The codec and its arrays for a run that starts; the main process copies a VAE into the workdir.

    Args:
      fitted: arrays of a codec that was fitted on the data; None for the others.

    Raises:
      UserError: the VAE cannot be read, or the workdir holds another one.
    """
    if config.model.codec.name == "vae":
        if distributed.is_main():
            diffusers_vae.copy_folder(config.model.codec.vae, Path(workdir) / "frozen" / "vae")
        distributed.barrier("the VAE is in the workdir")
    return from_workdir(config, workdir, fitted)


def from_workdir(config: ConfigDict, workdir: str | os.PathLike[str], arrays: Any) -> tuple[Codec, Any]:
    """The codec of a workdir.

    Args:
      arrays: those of a fitted codec, from its checkpoint; None for the others.
    """
    c = config.model.codec
    if c.name == "pixels":
        return PixelsCodec(), {}
    if c.name == "pca":
        if arrays is None:
            raise UserError(f"{workdir}: config.model.codec.name is 'pca', but the checkpoint carries no codec.")
        return PCACodec.from_params(arrays), {k: jnp.asarray(v) for k, v in arrays.items()}
    module, params, _ = diffusers_vae.load_vae(Path(workdir) / "frozen" / "vae", dtype=c.dtype)
    return VAECodec(module, microbatch=c.microbatch), params


def checkpointed_arrays(config: ConfigDict, frozen: Any) -> Any:
    """What of the codec a checkpoint carries: a fitted codec's arrays, None for the others."""
    return frozen if config.model.codec.name == "pca" else None
