"""The config fields of GR1, and their checks."""

from __future__ import annotations

from ml_collections import ConfigDict

from uwm_jax.models.vit import HEAD_WIDTH
from uwm_jax.systems import fields
from uwm_jax.systems.base import Fields
from uwm_jax.systems.fields import require

PARTS = ("action", "next_obs")  # of the loss

AT_LEAST_ONE = (
    *("model.encoder.patch", "model.encoder.width", "model.encoder.depth", "model.encoder.mlp_dim"),
    *("model.resampler.num_latents", "model.resampler.depth", "model.resampler.num_heads", "model.resampler.head_dim"),
    *("model.decoder.depth", "model.decoder.num_heads", "model.decoder.mlp_ratio"),
)

FIELDS = Fields(
    sampling=("model.dtype", "model.attention", "model.scan_blocks"),
    shaping=(
        *("model.embed_dim", "model.depth", "model.mlp_ratio", "model.qkv_bias", "model.patch"),
        *("model.encoder.patch", "model.encoder.width", "model.encoder.depth", "model.encoder.mlp_dim"),
        *("model.resampler.*", "model.decoder.depth", "model.decoder.mlp_ratio", "model.decoder.qkv_bias"),
        *("data.cameras", "data.action", "data.crop"),
        *("data.window.obs", "data.window.action", "data.window.next_obs"),
    ),
    fixed={"model.patch": "next_obs"},
)


def add_fields(c: ConfigDict) -> None:
    """The baseline of the UWM paper, which is smaller than the original GR-1 in its inputs (`network.py`)."""
    c.model = ConfigDict()
    fields.add_transformer(c.model)
    c.model.patch = (32, 32)  # rows, columns of pixels that a token of the image decoder predicts

    c.model.encoder = ConfigDict()  # ViT-B/32
    c.model.encoder.patch = 32  # rows and columns of pixels that a token reads
    c.model.encoder.width = 768  # of its tokens; 64 channels make an attention head
    c.model.encoder.depth = 12  # number of blocks
    c.model.encoder.mlp_dim = 3072  # hidden units of a block's MLP
    # ImageNet weights to start from: safetensors file, its folder, or hub name[@revision][/file]; "" = none
    c.model.encoder.imagenet_weights = ""

    c.model.resampler = ConfigDict()
    c.model.resampler.num_latents = 9  # tokens of a frame, besides the one from the ViT's class token
    c.model.resampler.depth = 3  # number of layers
    c.model.resampler.num_heads = 4  # attention heads of a layer
    c.model.resampler.head_dim = 128  # channels of a head

    c.model.decoder = ConfigDict()  # of images
    c.model.decoder.depth = 3  # blocks, as wide as the transformer's
    c.model.decoder.num_heads = 16  # attention heads of a block
    c.model.decoder.mlp_ratio = 4  # hidden units of a block's MLP, in widths of the tokens
    c.model.decoder.qkv_bias = True  # whether queries, keys and values have biases

    c.loss = ConfigDict()
    c.loss.weights = ConfigDict({part: 1.0 for part in PARTS})  # of the parts in the training loss


def check(c: ConfigDict) -> None:
    """Raises UserError for values of these fields that do not fit together."""
    m, crop = c.model, c.data.crop
    fields.check_transformer(m)
    require(
        m.encoder.width % HEAD_WIDTH == 0,
        f"config.model.encoder.width: expected a multiple of {HEAD_WIDTH} (an attention head of the ViT), found "
        f"{m.encoder.width}.",
    )
    require(
        m.embed_dim % m.decoder.num_heads == 0,
        f"config.model.decoder.num_heads={m.decoder.num_heads} does not divide config.model.embed_dim={m.embed_dim}.",
    )
    require(
        len(m.patch) == 2 and min(m.patch) > 0,
        f"config.model.patch: expected 2 positive integers, rows and columns, found {m.patch}.",
    )
    require(
        all(size % m.encoder.patch == 0 for size in crop),
        f"config.model.encoder.patch={m.encoder.patch} does not divide config.data.crop={crop}.",
    )
    require(
        all(size % patch == 0 for size, patch in zip(crop, m.patch, strict=True)),
        f"config.model.patch={m.patch} does not divide config.data.crop={crop}.",
    )
    fields.check_cameras(c)
    fields.check_window(c, ("obs", "action", "next_obs"))
    fields.check_two_frame_groups(c)
