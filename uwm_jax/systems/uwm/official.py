"""UWM's official checkpoints: names and layouts of the parameters, and the saved configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from uwm_jax.systems import fields
from uwm_jax.systems.uwm.modes import MODES
from uwm_jax.torch_bridge import layout, names, official_config
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape
from uwm_jax.torch_bridge.official_config import NET, Conflicts, Official, OfficialRun, Shapes
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, ints, typed

if TYPE_CHECKING:
    from uwm_jax.systems.uwm.system import UWM

RESNET = "obs_encoder.img_encoder.model"


def entry_of(patch: Sequence[int]) -> EntryOf:
    """The entries of the tree {"obs_encoder", "noise_pred_net"}.

    Args:
      patch: latent (frames, rows, columns) of a video token.
    """
    values = tuple(patch)

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name = _official_name(path, layer)
        module, leaf = path[-2], path[-1]
        if module == "patch_encoder" and leaf == "kernel":
            return layout.patch_encoder(name, path, layer, shape, values)
        if module == "patch_decoder":
            return layout.patch_decoder(name, path, layer, shape, values)
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        if path[:2] == ("obs_encoder", "img_encoder") and len(shape) == 4:
            return layout.convolution(name, path, layer, shape)
        return layout.linear(name, path, layer, shape, input_axes=2 if module == "proj" else 1)  # (heads, head size)

    return entry


def _official_name(path: Path, layer: int | None) -> str:
    if path[0] == "noise_pred_net":
        return names.of_network(path, layer, names.ACTIONS_AND_VIDEO)
    return names.of_obs_encoder(path, RESNET)


def read(official: OfficialYaml, shapes: Shapes, c: ConfigDict) -> OfficialRun:
    """An official run; arguments, errors and result as `Official.read` says."""
    official_config.refuse_backbone(official)
    if typed(official, "model.obs_encoder.imagenet_norm", bool, False):
        raise official.error(
            "model.obs_encoder.imagenet_norm",
            "is true, which we do not model; ImageNet normalisation is part of the ResNet",
        )
    official_config.refuse_towers(shapes)
    official_config.require_names(shapes, NET, (f"{NET}pos_embed", f"{RESNET}.fc.weight"))
    conflicts = Conflicts(official, shapes)
    data = official_config.read_data(official, c)
    official_config.read_window(official, c)
    official_config.read_diffusion(official, c)
    low_dim, text_dim = official_config.read_conditions(official, c, data, conflicts)
    m = c.model
    for field in ("num_heads", "embed_dim", "depth", "num_registers", "timestep_embed_dim", "mlp_ratio"):
        m[field] = typed(official, f"model.{field}", int)
    m.qkv_bias = typed(official, "model.qkv_bias", bool, True)
    m.patch = ints(official, "model.latent_patch_shape", 3)
    _compare(c, low_dim, data.action_dim, conflicts)
    normalized = official_config.normalized(data, low_dim)
    sizes = data.cameras, low_dim, data.low_dim_seen, data.action_dim, text_dim
    return OfficialRun(c, *sizes, normalized, tuple(conflicts.lines))


def _compare(c: ConfigDict, low_dim: dict[str, int], action_dim: int, conflicts: Conflicts) -> None:
    """Collects the fields that the tensors contradict; also reads the ResNet's sizes into the config."""
    m = c.model
    conflicts.agree_with_blocks(m)
    conflicts.agree_with_axis("model.num_registers", m.num_registers, NET + "registers", 1, rank=3)
    conflicts.agree_with_axis("model.action_dim", action_dim, NET + "action_encoder.0.weight", 1)
    time = NET + "timestep_embedding.proj.2.weight"
    conflicts.agree_with_axis("model.timestep_embed_dim", m.timestep_embed_dim, time, 0)
    conflicts.agree_with_resnet(m, RESNET + ".")
    if (video := conflicts.agree_with_vae(c)) is not None:
        conflicts.agree_with_axis(
            f"model.action_len + video tokens ({video}) + model.num_registers",
            len(c.data.window.action) + video + m.num_registers,
            NET + "pos_embed",
            1,
            rank=3,
        )
    conflicts.agree_with_condition(c, low_dim, NET + "head.adaLN_modulation.1.weight")


def describe(system: UWM) -> dict[str, Any]:
    """Meaning of the tensors, besides what all systems say: enough to sample without our code."""
    c, schedule = system.config, system.schedule
    return {
        "shapes": {
            "action": list(system.action_shape),
            "next_obs_latent": list(system.latent_shape),  # V, T, h, w, C
            "encoder_pool_order": ["row", "column", "channel"] if c.model.encoder.pool == "flatten" else [],
        },
        "diffusion": {
            **c.diffusion.to_dict(),
            "timesteps": schedule.timesteps.tolist(),
            "previous_timesteps": schedule.previous_timesteps.tolist(),
            "given_timestep": 0,
            "hidden_timestep": schedule.sample_hidden_timestep,
            "alphas_cumprod": [float(a) for a in schedule.alphas_cumprod],
        },
        "modes": {mode: {m: role.value for m, role in roles.items()} for mode, roles in MODES.items()},
    }


def _entry_of(config: ConfigDict) -> EntryOf:
    """`entry_of` for a config; raises UserError for AdaLN that official checkpoints do not have."""
    fields.require_official_adaln(config.model)
    return entry_of(config.model.patch)


OFFICIAL = Official(
    classes=("models.uwm.UnifiedWorldModel",),
    algo="uwm",
    read=read,
    entry_of=_entry_of,
    describe=describe,
    runs=True,
)
