"""GR1's parameters by name: how they lie on a mesh, and what they belong to.

On a mesh, `tensor` cuts heads and hidden units, on the way in by columns and on the way out by rows, so that a block
needs one sum over `tensor` after its attention and one after its MLP; `fsdp` cuts the other axis. This is the same for
all stacks of blocks: the ViT, the resampler, the transformer and the image decoder.
"""

from __future__ import annotations

from uwm_jax.systems.base import Pretrained, TreeInfo
from uwm_jax.torch_bridge.torchvision_vit import load_imagenet_vit

MESH_RULES = (
    ("*/blocks/qkv/kernel", (None, "fsdp", None, "tensor", None)),
    ("*/blocks/qkv/bias", (None, None, "tensor", None)),
    ("*/blocks/proj/kernel", (None, "tensor", None, "fsdp")),
    ("*/blocks/to_q/kernel", (None, "fsdp", "tensor", None)),
    ("*/blocks/to_kv/kernel", (None, "fsdp", None, "tensor", None)),
    ("*/blocks/to_out/kernel", (None, "tensor", None, "fsdp")),
    ("*/blocks/fc1/kernel", (None, "fsdp", "tensor")),
    ("*/blocks/fc1/bias", (None, "tensor")),
    ("*/blocks/fc2/kernel", (None, "tensor", "fsdp")),
    ("*/kernel", ("fsdp", None)),
    ("*", ()),
)

_OF_FRAMES = (
    "There is one row for each current frame, or for each of its tokens, so another number of cameras or frames "
    "(config.data.cameras, config.data.window.obs) changes it."
)

TREE = TreeInfo(
    gradient_groups=(
        ("obs_encoder/vit/", "vit"),
        ("obs_encoder/", "obs_tokens"),  # the resampler, the two heads and the tables of positions
        ("decoder/", "decoder"),
        ("action_head/", "action_head"),
        ("", "transformer"),  # with its queries
    ),
    mesh_rules=MESH_RULES,
    # Images have no units of a run's own: they are normalised as ImageNet's.
    interfaces={"action": ("action_head/fc3/kernel",), "next_obs": ("decoder/head/kernel",)},
    misfits={
        "obs_queries": _OF_FRAMES,
        "obs_encoder/pos_*": _OF_FRAMES,
        "action_queries": (
            "There is one query for each action, so another number of actions (config.data.window.action) changes it "
            "alone."
        ),
        "obs_encoder/vit/pos_embedding": "There is one row for each patch of an image (config.data.crop).",
        "decoder/pos_embed": (
            "There is one row for each patch of an image (config.data.crop, config.model.patch); a fresh table is the "
            "same formula."
        ),
    },
    pretrained=(
        Pretrained(
            field="model.encoder.imagenet_weights",
            path="obs_encoder/vit",
            marker="obs_encoder/vit/conv_proj/kernel",
            load=load_imagenet_vit,
        ),
    ),
    untrained=("obs_encoder/heads/*", "decoder/pos_embed"),
)
