"""The config fields of the Unified World Model, and their checks."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.systems import fields
from uwm_jax.systems.base import Fields
from uwm_jax.systems.fields import require
from uwm_jax.systems.uwm.modes import MODALITIES

CHOICES = {
    "diffusion.hide_at": ("first", "train"),
    "diffusion.next_obs_timesteps": ("uniform", "high_noise"),
    "loss.action_free": ("kept", "dropped"),
}

FIELDS = Fields(
    sampling=fields.SAMPLING,
    shaping=(
        *fields.ADALN,
        *("model.embed_dim", "model.depth", "model.mlp_ratio", "model.qkv_bias", "model.num_registers", "model.patch"),
        *("model.timestep_embed_dim", "model.codec.name", "data.cameras", "data.low_dim", "data.text", "data.action"),
        *("model.encoder.stage_sizes", "model.encoder.width", "model.encoder.pool", "model.encoder.use_*"),
        *("data.window.obs", "data.window.action", "data.window.next_obs", "data.crop"),
    ),
    fixed={
        "diffusion.num_train_steps": None,
        "diffusion.beta_schedule": None,
        "diffusion.prediction.action": "action",
        "diffusion.prediction.next_obs": "next_obs",
        "model.codec.name": "next_obs",
        "model.patch": "next_obs",
    },
    idle={
        "loss.action_free": lambda flat: all(use for name, use in flat.items() if name.endswith(".use_actions")),
        "model.adaln_rank": fields.rank_is_idle,
    },
)


def add_fields(c: ConfigDict) -> None:
    """The paper's model."""
    c.model = ConfigDict()
    fields.add_transformer(c.model)
    fields.add_adaln(c.model)
    c.model.num_registers = 8  # learned tokens without an output
    c.model.timestep_embed_dim = 512  # width of the embedding of both timesteps
    c.model.patch = (2, 4, 4)  # latent frames, rows, columns per video token
    fields.add_resnet_encoder(c.model)
    fields.add_codec(c.model)

    fields.add_ddim(c, MODALITIES)
    c.diffusion.hide_at = "first"  # timestep of a hidden modality: the sampler's first (official), or train: T - 1
    # timesteps of next_obs in training: uniform, or high_noise (half of the draws from the noisiest quarter)
    c.diffusion.next_obs_timesteps = "uniform"

    c.loss = ConfigDict()
    c.loss.weights = ConfigDict({m: 1.0 for m in MODALITIES})  # of the parts in the training loss
    # Rows without actions: kept (official: with epsilon they predict the noise that they were given) or dropped. With
    # sample and v, kept would teach the centre of the actions' range, and dilute loss/action with what is easy.
    c.loss.action_free = fields.follows(c.diffusion.prediction, "action", _action_free_of_prediction)


def check(c: ConfigDict) -> None:
    """Raises UserError for values of these fields that do not fit together."""
    m, w = c.model, c.data.window
    fields.check_transformer(m)
    fields.check_timestep_width(m)
    fields.check_resnet_encoder(c)
    fields.check_patch(m)
    fields.check_ddim(c)
    fields.check_cameras(c)
    fields.check_window(c, ("obs", "action", "next_obs"))
    fields.check_two_frame_groups(c)
    require(
        len(w.next_obs) % m.patch[0] == 0,
        f"config.model.patch[0]={m.patch[0]} does not divide the {len(w.next_obs)} frames of next_obs.",
    )


def _action_free_of_prediction(_: Any, prediction: str) -> str:
    return "kept" if prediction == "epsilon" else "dropped"
