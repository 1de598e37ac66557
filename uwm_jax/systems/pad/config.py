"""The config fields of PAD, and their checks."""

from __future__ import annotations

from ml_collections import ConfigDict

from uwm_jax.systems import fields
from uwm_jax.systems.base import Fields
from uwm_jax.systems.fields import require

MODALITIES = ("action", "next_obs")

FIELDS = Fields(
    sampling=fields.SAMPLING,
    shaping=(
        *fields.ADALN,
        *("model.embed_dim", "model.depth", "model.mlp_ratio", "model.qkv_bias", "model.patch"),
        *("model.timestep_embed_dim", "model.codec.name", "data.cameras", "data.action", "data.crop"),
        *("data.window.obs", "data.window.action", "data.window.next_obs"),
    ),
    fixed={
        "diffusion.num_train_steps": None,
        "diffusion.beta_schedule": None,
        "diffusion.prediction.action": "action",
        "diffusion.prediction.next_obs": "next_obs",
        "model.codec.name": "next_obs",
        "model.patch": "next_obs",
    },
    idle={"model.adaln_rank": fields.rank_is_idle},
)


def add_fields(c: ConfigDict) -> None:
    """The model of the Unified World Models paper's comparison."""
    c.model = ConfigDict()
    fields.add_transformer(c.model)
    fields.add_adaln(c.model)
    c.model.timestep_embed_dim = 512  # width of the timestep's embedding, which is the blocks' condition
    c.model.patch = (2, 4, 4)  # latent frames, rows, columns per video token
    fields.add_codec(c.model)
    fields.add_ddim(c, MODALITIES)
    c.loss = ConfigDict()
    c.loss.weights = ConfigDict({m: 1.0 for m in MODALITIES})  # of the parts in the sum that is trained


def check(c: ConfigDict) -> None:
    """Raises UserError for values of these fields that do not fit together."""
    m, w = c.model, c.data.window
    fields.check_transformer(m)
    fields.check_timestep_width(m)
    fields.check_patch(m)
    fields.check_ddim(c)
    fields.check_cameras(c)
    fields.check_window(c, ("obs", "action", "next_obs"))
    fields.check_two_frame_groups(c)
    require(
        len(w.next_obs) % m.patch[0] == 0,
        f"config.model.patch[0]={m.patch[0]} does not divide the {len(w.next_obs)} frames of next_obs.",
    )


def remarks(c: ConfigDict) -> list[str]:
    """Lines about values that work but are seldom meant."""
    unread = [name for name in ("low_dim", "text") if c.data[name]]
    lines = [f"config.data.{name}={c.data[name]!r} is loaded and not used: PAD sees frames alone." for name in unread]
    return lines + fields.about_clip(c)
