"""PAD's checkpoints of the Unified World Models code: names and layouts of the parameters, and the saved
configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from uwm_jax.systems import fields
from uwm_jax.torch_bridge import layout, names, official_config
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape
from uwm_jax.torch_bridge.official_config import NET, Conflicts, Official, OfficialRun, Shapes
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, ints, typed

if TYPE_CHECKING:
    from uwm_jax.systems.pad.system import PAD


def entry_of(patch: Sequence[int]) -> EntryOf:
    """The entries of the tree {"noise_pred_net"}.

    Args:
      patch: latent (frames, rows, columns) of a video token.
    """
    values = tuple(patch)

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name = names.of_network(path, layer, names.ACTIONS_AND_VIDEO)
        module, leaf = path[-2], path[-1]
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        if module == "patch_encoder":
            return layout.patch_encoder(name, path, layer, shape, values)
        if module == "patch_decoder":
            return _patch_decoder(name, path, layer, shape, values)
        return layout.linear(name, path, layer, shape, input_axes=2 if module == "proj" else 1)  # (heads, head size)

    return entry


def _patch_decoder(name: str, path: Path, layer: int | None, shape: Shape, patch: Shape) -> Entry:
    """A kernel (D, patch values), channel innermost; torch has a transposed convolution (D, C, *patch)."""
    channels, axes = shape[1] // math.prod(patch), len(patch)
    order = (0, axes + 1, *range(1, axes + 1))
    return Entry(name, path, layer, (shape[0], *patch, channels), order, (shape[0], channels, *patch))


def read(official: OfficialYaml, shapes: Shapes, c: ConfigDict) -> OfficialRun:
    """An official run; arguments, errors and result as `Official.read` says."""
    if typed(official, "model.obs_encoder.imagenet_norm", bool, False):
        raise official.error("model.obs_encoder.imagenet_norm", "is true, but PAD's frames go to the VAE alone")
    official_config.require_names(shapes, NET, (f"{NET}pos_embed", f"{NET}pad_tokens"))
    data = official_config.read_data(official, c)
    official_config.read_window(official, c)
    official_config.read_diffusion(official, c)
    m = c.model
    for field in ("num_heads", "embed_dim", "depth", "timestep_embed_dim", "mlp_ratio"):
        m[field] = typed(official, f"model.{field}", int)
    m.qkv_bias = typed(official, "model.qkv_bias", bool, True)
    m.patch = ints(official, "model.latent_patch_shape", 3)
    return OfficialRun(
        config=c,
        cameras=data.cameras,
        low_dim={},
        low_dim_seen=data.low_dim_seen,
        action_dim=data.action_dim,
        text_dim=0,
        normalized=official_config.normalized(data, {}),
        conflicts=_conflicts(official, shapes, c, data.action_dim),
    )


def _conflicts(official: OfficialYaml, shapes: Shapes, c: ConfigDict, action_dim: int) -> tuple[str, ...]:
    """One line about each field that the tensors contradict."""
    m, conflicts, actions = c.model, Conflicts(official, shapes), len(c.data.window.action)
    conflicts.agree_with_blocks(m)
    conflicts.agree_with_axis("model.action_dim", action_dim, NET + "action_encoder.0.weight", 1)
    conflicts.agree_with_axis("model.action_len", actions, NET + "pad_tokens", 1, rank=3)
    for tensor, axis in (("timestep_embedding.proj.2.weight", 0), ("head.adaLN_modulation.1.weight", 1)):
        conflicts.agree_with_axis("model.timestep_embed_dim", m.timestep_embed_dim, NET + tensor, axis)
    if (video := conflicts.agree_with_vae(c, sets=2)) is not None:
        tokens = f"model.action_len + video tokens ({video})"
        conflicts.agree_with_axis(tokens, actions + video, NET + "pos_embed", 1, rank=3)
    return tuple(conflicts.lines)


def describe(system: PAD) -> dict[str, Any]:
    """Meaning of the tensors, besides what all systems say: enough to sample without our code."""
    schedule = system.schedule
    return {
        "shapes": {
            "action": list(system.action_shape),
            "obs_latent": list(system.latent_shape),  # V, T, h, w, C
            "next_obs_latent": list(system.latent_shape),
        },
        "diffusion": {
            **system.config.diffusion.to_dict(),
            "timesteps": schedule.timesteps.tolist(),
            "alphas_cumprod": [float(a) for a in schedule.alphas_cumprod],
        },
    }


def _entry_of(config: ConfigDict) -> EntryOf:
    """`entry_of` for a config; raises UserError for AdaLN that official checkpoints do not have."""
    fields.require_official_adaln(config.model)
    return entry_of(config.model.patch)


OFFICIAL = Official(
    classes=("models.pad.PAD",),
    algo="pad",
    read=read,
    entry_of=_entry_of,
    describe=describe,
)
