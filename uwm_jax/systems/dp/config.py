"""The config fields of Diffusion Policy, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.models.unet1d import FINAL_GROUPS
from uwm_jax.systems import fields
from uwm_jax.systems.base import Fields
from uwm_jax.systems.fields import require

PREDICTORS = ("transformer", "unet")
KINDS = ("ddim", "flow")
CHOICES = {"model.predictor": PREDICTORS, "diffusion.kind": KINDS}

# Fields that one value of another field alone reads.
_ONLY_OF = {
    ("model.predictor", "transformer"): (
        *("model.depth", "model.num_heads", "model.mlp_ratio", "model.qkv_bias", "model.scan_blocks", "model.remat"),
        "model.attention",
        *fields.ADALN,
    ),
    ("model.predictor", "unet"): (
        *("model.unet.down_dims", "model.unet.kernel_size", "model.unet.groups", "model.unet.fourier"),
    ),
    ("diffusion.kind", "ddim"): (
        *("diffusion.beta_schedule", "diffusion.spacing", "diffusion.prediction.action", "diffusion.clip.action"),
    ),
    ("diffusion.kind", "flow"): ("diffusion.timeshift",),
}


def _unused(field: str, value: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda flat: flat[field] != value


FIELDS = Fields(
    sampling=(*fields.SAMPLING, "diffusion.timeshift"),
    shaping=(
        *fields.ADALN,
        *("model.predictor", "model.embed_dim", "model.depth", "model.mlp_ratio", "model.qkv_bias", "model.unet.*"),
        *("model.timestep_embed_dim", "data.cameras", "data.low_dim", "data.text", "data.action", "data.crop"),
        *("model.encoder.stage_sizes", "model.encoder.width", "model.encoder.pool", "model.encoder.use_*"),
        *("data.window.obs", "data.window.action"),
    ),
    fixed={
        "diffusion.num_train_steps": None,
        "diffusion.beta_schedule": None,
        "diffusion.kind": "action",
        "diffusion.prediction.action": "action",
    },
    idle={
        **{name: _unused(*only) for only, names in _ONLY_OF.items() for name in names},
        "model.adaln_rank": lambda flat: flat["model.predictor"] != "transformer" or fields.rank_is_idle(flat),
    },
)


def add_fields(c: ConfigDict) -> None:
    """The official comparison of the Unified World Models code: the transformer, by DDIM."""
    c.data.window.next_obs = ()  # it reads no later frame

    c.model = ConfigDict()
    c.model.predictor = "transformer"  # of the noise: transformer, or unet (1-D, along the actions)
    fields.add_transformer(c.model)  # embed_dim: of the features of a frame too
    fields.add_adaln(c.model)
    c.model.timestep_embed_dim = 256  # width of the timestep's embedding; even
    c.model.unet = ConfigDict()
    c.model.unet.down_dims = (256, 512, 1024)  # channels of each level
    c.model.unet.kernel_size = 3  # taps of the convolutions; odd
    c.model.unet.groups = 8  # of the normalisations
    c.model.unet.fourier = False  # learned random Fourier features of the timestep in place of sinusoids
    fields.add_resnet_encoder(c.model)

    fields.add_ddim(c, ("action",))
    c.diffusion.kind = "ddim"  # or flow: flow matching, whose network predicts the velocity
    c.diffusion.timeshift = 1.0  # of flow's sampler: more than 1 makes the steps near the noise smaller
    c.diffusion.num_train_noise_samples = 1  # draws of noise and timestep per row and step, on the same observation

    c.loss = ConfigDict()
    c.loss.weights = ConfigDict({"action": 1.0})  # of the loss's one part


def check(c: ConfigDict) -> None:
    """Raises UserError for values of these fields that do not fit together."""
    m, d = c.model, c.diffusion
    if m.predictor == "transformer":
        fields.check_transformer(m)
    else:
        _check_unet(m.unet, len(c.data.window.action))
    fields.check_timestep_width(m)
    fields.check_resnet_encoder(c)
    fields.check_ddim(c)
    require(d.timeshift > 0, f"config.diffusion.timeshift: expected a positive number, found {d.timeshift:g}.")
    fields.check_cameras(c)
    fields.check_window(c, ("obs", "action"), absent=("next_obs",))
    for name, source in c.data.sources.items():
        require(
            source.use_actions,
            f"config.data.sources.{name}.use_actions=False: a dp run learns from actions alone, so rows without any "
            "have nothing to teach it. Leave the source out, or train a system that learns from video, such as uwm.",
        )


def _check_unet(u: ConfigDict, action_len: int) -> None:
    divisor = 2 ** (len(u.down_dims) - 1)
    require(
        u.groups > 0 and len(u.down_dims) > 1 and min(u.down_dims) > 0 and not any(n % u.groups for n in u.down_dims),
        f"config.model.unet.down_dims: expected at least two multiples of config.model.unet.groups={u.groups}, found "
        f"{u.down_dims}.",
    )
    require(
        u.down_dims[0] % FINAL_GROUPS == 0,
        f"config.model.unet.down_dims: expected a multiple of {FINAL_GROUPS}, the groups of the last normalisation, as "
        f"the first of them, found {u.down_dims}.",
    )
    require(
        action_len % divisor == 0,
        f"config.data.window.action has {action_len} steps; config.model.unet.down_dims={u.down_dims} halves them "
        f"{len(u.down_dims) - 1} times, so expected a multiple of {divisor}.",
    )
    require(u.kernel_size % 2 == 1, f"config.model.unet.kernel_size: expected an odd number, found {u.kernel_size}.")


def remarks(config: ConfigDict) -> list[str]:
    """A line about each field that was changed and has no effect."""
    default = ConfigDict({"data": {"window": {}}})
    add_fields(default)
    lines = []
    for (field, value), names in _ONLY_OF.items():
        if _at(config, field) == value:
            continue
        changed = [name for name in names if _at(config, name) != _at(default, name)]
        lines += [
            f"config.{name}={_at(config, name)} has no effect: config.{field} is not {value}." for name in changed
        ]
    return lines


def _at(config: ConfigDict, field: str) -> Any:
    for key in field.split("."):
        config = config[key]
    return config
