"""The frozen codec of a run: its origin, and where it is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec, PCACodec, PixelsCodec, VAECodec
from uwm_jax.errors import UserError
from uwm_jax.parallel import distributed
from uwm_jax.torch_bridge import diffusers_vae


def open_codec(config: ConfigDict, vae: str | os.PathLike[str], arrays: Any) -> tuple[Codec, Any]:
    """The codec of a run and its parameters.

    Args:
      vae: a diffusers folder or hub name; not read for other codecs.
      arrays: those of a fitted codec, None for the others.

    Raises:
      UserError: the VAE cannot be read, or there are no arrays of a fitted codec.
    """
    c = config.model.codec
    if c.name == "pixels":
        return PixelsCodec(), {}
    if c.name == "pca":
        if arrays is None:
            raise UserError("config.model.codec.name is 'pca', but the checkpoint carries no codec.")
        return PCACodec.from_arrays(arrays), jax.device_put(dict(arrays))
    module, params, _ = diffusers_vae.load_vae(vae, dtype=c.dtype)
    return VAECodec(module, microbatch=c.microbatch), params


def from_workdir(config: ConfigDict, workdir: str | os.PathLike[str], arrays: Any) -> tuple[Codec, Any]:
    """The codec of a workdir, which has a VAE of its own; `arrays` are its checkpoint's."""
    return open_codec(config, vae_folder(workdir), arrays)


def keep_vae(config: ConfigDict, vae: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> None:
    """Copies the VAE of a run that starts into its workdir (the main process does); nothing for other codecs.

    Raises:
      UserError: the workdir holds another one.
    """
    if config.model.codec.name != "vae":
        return
    if distributed.is_main():
        diffusers_vae.copy_folder(vae, vae_folder(workdir))
    distributed.barrier("the VAE is in the workdir")


def vae_folder(workdir: str | os.PathLike[str]) -> Path:
    """The folder in which a workdir keeps its VAE."""
    return Path(workdir) / "frozen" / "vae"


def checkpointed_arrays(config: ConfigDict, frozen: Any) -> Any:
    """The part of the codec that a checkpoint carries: a fitted codec's arrays, None for the others."""
    return frozen if config.model.codec.name == "pca" else None
