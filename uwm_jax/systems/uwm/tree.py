"""The parameters of a Unified World Model by name: how they lie on a mesh, and what they belong to."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from uwm_jax.systems import tables
from uwm_jax.systems.base import Pretrained, TreeInfo
from uwm_jax.torch_bridge.torchvision_resnet import load_imagenet_resnet

TREE = TreeInfo(
    gradient_groups=(*tables.RESNET_ENCODER_GROUPS, *tables.ADALN_TRANSFORMER_GROUPS),
    mesh_rules=(*tables.ADALN_TRANSFORMER_RULES, *tables.RESNET_ENCODER_RULES, *tables.WHOLE),
    interfaces={
        "action": tables.ACTION_INTERFACE,
        "next_obs": ("noise_pred_net/patch_encoder/kernel", "noise_pred_net/patch_decoder/kernel"),
        "low_dim": tables.condition_interface("official"),
    },
    codec="next_obs",
    misfits={
        "noise_pred_net/pos_embed": (
            "The position embedding has a row for each action, video token and register, so that another number of "
            "actions (config.data.window.action) changes it alone."
        ),
        **tables.ADALN_MISFITS,
    },
    pretrained=(
        Pretrained(
            field="model.encoder.imagenet_weights",
            path="obs_encoder/img_encoder",
            marker="obs_encoder/img_encoder/conv1/kernel",
            load=load_imagenet_resnet,
        ),
    ),
)


def tree(config: ConfigDict) -> TreeInfo:
    """`TREE` for the AdaLN and the observation of a config."""
    interfaces = {
        **TREE.interfaces,
        "low_dim": tables.condition_interface(config.model.adaln),
        **tables.text_interface(config.model.encoder.use_language),
    }
    return dataclasses.replace(TREE, interfaces=interfaces)
