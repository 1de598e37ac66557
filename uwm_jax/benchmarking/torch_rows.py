"""The rows of `benchmark_step` in PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from uwm_jax.benchmarking.rows import Model
from uwm_jax.models.codecs import PCACodec, VAECodec
from uwm_jax.system import System
from uwm_jax.torch_bridge.torch_loop import TorchLoop
from uwm_jax.torch_bridge.torch_network import UWM


def calls(model: Model, rows: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """What torch runs beside each row; rows that it cannot run are left out."""
    torch.set_num_threads(threads())
    system = model.system
    runs: dict[str, Callable[[], Any]] = {}
    codec = _torch_codec(system) if any(row.startswith("pixels/") for row in rows) else None
    description = {
        "config": model.config.to_dict(),
        "cameras": system.facts.cameras,
        "images": {"crop": model.config.data.crop},
        "low_dim": system.facts.low_dim,
        "text_dim": system.facts.text_dim,
        "shapes": {"action": system.action_shape, "next_obs_latent": system.latent_shape},
        "codec": codec or {"name": "pixels"},  # which has no arrays
    }
    network = UWM.from_description(description)
    loop = TorchLoop(network, model.config, system.cameras, system.facts.low_dim, system.schedule.alphas_cumprod)
    for row in rows:
        source, _, stage = row.partition("/")
        if source == "latents" or (source == "pixels" and codec is not None):
            batch = {name: torch.from_numpy(np.array(x)) for name, x in model.batches[source].items()}
            runs[row] = functools.partial(getattr(loop, stage), batch)
    return runs


def _torch_codec(system: System) -> dict[str, Any] | None:
    """The codec as `convert to-torch` describes it; None for a VAE without diffusers."""
    codec = system.codec
    if isinstance(codec, PCACodec):
        return {"name": "pca", "patch": codec.patch, "channels": codec.channels}
    if not isinstance(codec, VAECodec):
        return {"name": "pixels"}
    if importlib.util.find_spec("diffusers") is None:
        return None
    vae, levels = codec.vae, len(codec.vae.block_out_channels)
    fields = "in_channels out_channels block_out_channels layers_per_block latent_channels norm_num_groups"
    config = {
        **{name: getattr(vae, name) for name in (*fields.split(), "scaling_factor")},
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return {"name": "vae", "diffusers_config": config}


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
