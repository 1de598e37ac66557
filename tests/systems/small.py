"""Small configs of every system, on demonstrations of PushT or on the DROID-like episodes of `tiny_dataset`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from uwm_jax.config import base

SYSTEMS = {"uwm": "uwm", "dp": "dp", "dp_unet": "dp", "dp_flow": "dp", "pad": "pad", "gr1": "gr1"}  # variant: system
SIZE = 16


def small_config(variant: str) -> ConfigDict:
    """A model that compiles in seconds on 16-pixel frames; the fields of the data are those of the caller."""
    kind = SYSTEMS[variant]
    c = base(kind)
    c.total_steps, c.batch_size, c.log_every, c.checkpoint.every = 2, 4, 1, 2
    c.eval.num_windows = 6
    c.data.num_streams, c.data.num_threads = 8, 1
    c.data.resize = c.data.crop = (SIZE, SIZE)
    c.data.window.action = (1, 2, 3, 4)
    c.optimizer.learning_rate = 1e-3
    c.model.embed_dim, c.model.depth, c.model.num_heads = 32, 2, 2
    if kind in ("uwm", "pad"):
        c.data.window.next_obs = (5, 6)
        c.model.timestep_embed_dim, c.model.patch = 16, (2, 2, 2)
        c.model.codec.name = "pca"
    if kind in ("uwm", "dp"):
        c.model.timestep_embed_dim = 16
        c.model.encoder.stage_sizes, c.model.encoder.width, c.model.encoder.pool = (1,), 16, "flatten"
        c.model.encoder.use_low_dim = True
    if kind == "uwm":
        c.model.num_registers = 2
    if kind == "dp":
        if variant == "dp_unet":
            c.model.predictor, c.model.unet.down_dims = "unet", (16, 32)
        c.diffusion.kind = "flow" if variant == "dp_flow" else "ddim"
    if kind == "gr1":
        c.data.window.next_obs = (5, 6)
        c.model.patch = (8, 8)
        c.model.encoder.patch, c.model.encoder.width, c.model.encoder.depth, c.model.encoder.mlp_dim = 8, 64, 1, 64
        c.model.resampler.num_latents, c.model.resampler.depth = 3, 1
        c.model.resampler.num_heads, c.model.resampler.head_dim = 2, 16
        c.model.decoder.depth, c.model.decoder.num_heads = 1, 2
    if "diffusion" in c:
        c.diffusion.num_inference_steps = 2
    return c


def on_pusht(config: ConfigDict, path: Path, val_ratio: float) -> ConfigDict:
    """The same on PushT's demonstrations."""
    config.data.path, config.data.cameras, config.data.val_ratio = str(path), ("image",), val_ratio
    config.data.low_dim = ("agent_pos",)
    return config


def on_tiny_dataset(config: ConfigDict, path: Path) -> ConfigDict:
    """The same on the episodes of `tiny_dataset`."""
    config.data.path, config.data.cameras, config.data.val_ratio = str(path), ("wrist",), 0.3
    config.data.low_dim = ("state",)
    config.data.action = (
        ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"),
        ("action_dict/gripper_position", "identity"),
    )
    return config
