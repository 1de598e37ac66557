"""Where the frozen codec of a run comes from, and where it is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.errors import UserError
from uwm_jax.models.codecs import Codec, PCACodec, PixelsCodec, VAECodec
from uwm_jax.torch_bridge import diffusers_vae


def for_new_run(
    config: ConfigDict, dataset: str | os.PathLike[str], workdir: str | os.PathLike[str], devices: int = 1
) -> tuple[Codec, Any]:
    """The codec and its arrays for a run that starts; a VAE is copied into the workdir.

    Args:
      dataset: the dataset's directory, which holds the `pca` codec fitted on its training episodes.
    """
    if config.model.codec.name == "vae":
        folder = Path(workdir) / "frozen" / "vae"
        if not folder.is_dir():
            diffusers_vae.copy_folder(config.model.codec.vae, folder)
        return from_workdir(config, workdir, None, devices)
    arrays = _read_pca(config, Path(dataset)) if config.model.codec.name == "pca" else None
    return from_workdir(config, workdir, arrays, devices)


def from_workdir(
    config: ConfigDict, workdir: str | os.PathLike[str], arrays: Any, devices: int = 1
) -> tuple[Codec, Any]:
    """The codec of a workdir.

    Args:
      arrays: those of a fitted codec, from its checkpoint; None for the others.
      devices: over how many the batch is spread; each takes `config.model.codec.microbatch` frames at a time.
    """
    c = config.model.codec
    if c.name == "pixels":
        return PixelsCodec(), {}
    if c.name == "pca":
        if arrays is None:
            raise UserError(f"{workdir}: config.model.codec.name is 'pca', but the checkpoint carries no codec.")
        return PCACodec.from_params(arrays), arrays
    module, params, _ = diffusers_vae.load_vae(Path(workdir) / "frozen" / "vae", dtype=c.dtype)
    return VAECodec(module, microbatch=c.microbatch * devices), params


def checkpointed_arrays(config: ConfigDict, frozen: Any) -> Any:
    """What of the codec a checkpoint carries: a fitted codec's arrays, None for the others."""
    return frozen if config.model.codec.name == "pca" else None


def _read_pca(config: ConfigDict, dataset: Path) -> dict[str, Any]:
    path = dataset / "codec" / "pca.npz"
    if not path.is_file():
        raise UserError(
            f"config.model.codec.name='pca' needs {path}, which data_prep.reshard fits on the training episodes: "
            "reshard the dataset again, or use config.model.codec.name='pixels'."
        )
    with np.load(path, allow_pickle=False) as stored:
        cameras = sorted(config.data.cameras)
        missing = [c for c in cameras if f"{c}/mean" not in stored]
        if missing:
            known = sorted(k.removesuffix("/mean") for k in stored if k.endswith("/mean"))
            raise UserError(f"{path}: holds no codec for camera {missing[0]!r}; it has {', '.join(known)}.")
        arrays = {
            "mean": np.stack([stored[f"{c}/mean"] for c in cameras]),
            "components": np.stack([stored[f"{c}/components"] for c in cameras]),
            "scale": stored["scale"],
        }
    size = arrays["mean"].shape[1:3]
    if size != tuple(config.data.crop):
        raise UserError(
            f"{path} was fitted on {size[0]}x{size[1]} images, but config.data.crop is {config.data.crop}: "
            f"set config.data.resize and config.data.crop to {size}, or reshard with --codec_size="
            f"{config.data.crop[0]},{config.data.crop[1]}."
        )
    return {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
