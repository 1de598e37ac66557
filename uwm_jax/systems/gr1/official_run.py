"""The saved configuration of an official GR1 run, with its tensors' shapes, as our config.

The ViT's sizes are read from the tensors alone: the official configuration names none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from uwm_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from uwm_jax.models.vit import HEAD_WIDTH
from uwm_jax.systems.gr1.official import RESAMPLER, VIT, entry_of
from uwm_jax.torch_bridge import torchvision_vit
from uwm_jax.torch_bridge.official_config import (
    Conflicts,
    Data,
    Official,
    OfficialRun,
    Shapes,
    normalized,
    read_data,
    read_window,
    require_names,
)
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, typed

if TYPE_CHECKING:
    from uwm_jax.systems.gr1.system import GR1

_RESAMPLER_FIELDS = {"depth": "depth", "num_heads": "heads", "head_dim": "dim_head", "num_latents": "num_latents"}


def read(official: OfficialYaml, shapes: Shapes, c: ConfigDict) -> OfficialRun:
    """The run behind a GR1 checkpoint (`uwm_jax.torch_bridge.official_config.Official`)."""
    require_names(shapes, f"{VIT}.", ("action_queries", f"{VIT}.class_token"))
    encoder = "model.obs_encoder"
    if not typed(official, f"{encoder}.imagenet_norm", bool, True):
        raise official.error(f"{encoder}.imagenet_norm", "is false, which we do not model; GR1's frames are normalised")
    if (media := typed(official, f"{encoder}.resampler_params.num_media_embeds", int, 1)) != 1:
        raise official.error(
            f"{encoder}.resampler_params.num_media_embeds", f"is {media}, which we do not model; only 1 is"
        )
    data = read_data(official, c)
    read_window(official, c)
    m = c.model
    for field in ("embed_dim", "depth", "num_heads", "mlp_ratio"):
        m[field] = typed(official, f"model.{field}", int)
    for field in ("depth", "num_heads", "mlp_ratio"):
        m.decoder[field] = typed(official, f"model.decoder_{field}", int)
    m.qkv_bias = typed(official, "model.qkv_bias", bool, True)
    m.decoder.qkv_bias = typed(official, "model.decoder_qkv_bias", bool, True)
    m.patch = (typed(official, "model.patch_size", int),) * 2
    for ours, theirs in _RESAMPLER_FIELDS.items():
        m.resampler[ours] = typed(official, f"{encoder}.resampler_params.{theirs}", int, m.resampler[ours])
    m.encoder.update(torchvision_vit.sizes({n.removeprefix(f"{VIT}."): s for n, s in shapes.items()}))
    conflicts = Conflicts(official, shapes)
    _compare(official, shapes, c, data, conflicts)
    return OfficialRun(
        config=c,
        cameras=data.cameras,
        low_dim={},
        low_dim_seen=data.low_dim_seen,
        action_dim=data.action_dim,
        text_dim=0,
        normalized=normalized(data, {}),
        conflicts=tuple(conflicts.lines),
    )


def _compare(official: OfficialYaml, shapes: Shapes, c: ConfigDict, data: Data, conflicts: Conflicts) -> None:
    """Adds what the tensors contradict."""
    m, agree, agree_with_axis = c.model, conflicts.agree, conflicts.agree_with_axis
    size = typed(official, "model.image_size", int, c.data.crop[0])
    if c.data.crop != (size, size):
        conflicts.add("model.image_size", f"is {size}, but the encoder's crop is {c.data.crop}")
    agree_with_axis("model.embed_dim", m.embed_dim, "action_queries", 2, rank=3)
    agree_with_axis("model.action_len", len(c.data.window.action), "action_queries", 1, rank=3)
    agree_with_axis("model.action_dim", data.action_dim, "action_head.4.weight", 0)
    frames, tokens = len(c.data.cameras) * len(c.data.window.obs), m.resampler.num_latents + 1
    of_all = f"the number of tokens ({frames} frames, {tokens} of each)"
    agree_with_axis(of_all, frames * tokens, "obs_queries", 1, rank=3)
    for prefix, part, field in (("transformer.", m, "model."), ("decoder_blocks.", m.decoder, "model.decoder_")):
        conflicts.agree_with_layers(f"{field}depth", part.depth, prefix)
        hidden, qkv = part.mlp_ratio * m.embed_dim, f"{prefix}0.attn.qkv."
        agree_with_axis(f"{field}mlp_ratio * model.embed_dim", hidden, f"{prefix}0.mlp.fc1.weight", 0)
        if qkv + "weight" in shapes:
            agree(f"{field}qkv_bias", part.qkv_bias, qkv + "bias", qkv + "bias" in shapes)
    agree_with_axis("3 * model.patch_size ** 2", 3 * m.patch[0] * m.patch[1], "decoder_head.1.weight", 0)

    params, latents = "model.obs_encoder.resampler_params", f"{RESAMPLER}.latents"
    conflicts.agree_with_layers(f"{params}.depth", m.resampler.depth, f"{RESAMPLER}.layers.")
    agree_with_axis(f"{params}.num_latents", m.resampler.num_latents, latents, 0)
    inner = m.resampler.num_heads * m.resampler.head_dim
    agree_with_axis(f"{params}.heads * dim_head", inner, f"{RESAMPLER}.layers.0.0.to_q.weight", 0)
    width = typed(official, f"{params}.dim", int, m.encoder.width)
    agree_with_axis(f"{params}.dim", width, latents, 1)
    agree_with_axis(f"{params}.dim (the ViT's width as well)", width, f"{VIT}.class_token", 2, rank=3)


def describe(system: GR1) -> dict[str, Any]:
    """Meaning of the tensors, besides what all systems say."""
    data, window = system.config.data, system.spec.window
    return {
        # images enter, and leave as the next frames, as (value in range - mean) / std
        "images": {
            "resize": list(data.resize),
            "crop": list(data.crop),
            "range": [0.0, 1.0],
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
        "shapes": {
            "action": list(system.action_shape),
            "next_obs_image": [system.num_views, len(window.next_obs), *data.crop, 3],  # V, T, h, w, colour
        },
        "vit_head_width": HEAD_WIDTH,
    }


OFFICIAL = Official(
    classes=("models.gr1.GR1",),
    algo="gr1",
    read=read,
    entry_of=lambda config: entry_of(config.model.encoder.patch, config.model.patch),
    describe=describe,
)
