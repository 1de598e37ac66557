"""The parameters of a Diffusion Policy by name: how they lie on a mesh, and what they belong to.

`systems/tables.py` explains the rules. As in the transformer, most of the U-Net are the kernels that read the condition
(FiLM's), and both mesh axes cut their outputs. Of its convolutions `fsdp` cuts the inputs and `tensor` the outputs; the
transposed ones are (taps, outputs, inputs).
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from uwm_jax.systems import tables
from uwm_jax.systems.base import Pretrained, TreeInfo
from uwm_jax.torch_bridge.torchvision_resnet import load_imagenet_resnet

_UNET_RULES = (
    ("noise_pred_net/*/film/kernel", (None, None, ("tensor", "fsdp"))),
    ("noise_pred_net/timestep_embedding/fc1/kernel", ("fsdp", "tensor")),
    ("noise_pred_net/timestep_embedding/fc2/kernel", ("tensor", "fsdp")),
    ("noise_pred_net/double_*/kernel", (None, "tensor", "fsdp")),
    ("noise_pred_net/*/kernel", (None, "fsdp", "tensor")),
)
_PRETRAINED = (
    Pretrained(
        field="model.encoder.imagenet_weights",
        path="obs_encoder/img_encoder",
        marker="obs_encoder/img_encoder/conv1/kernel",
        load=load_imagenet_resnet,
    ),
)

_UNET = TreeInfo(
    gradient_groups=(
        *tables.RESNET_ENCODER_GROUPS,
        ("/film/", "film"),
        ("/timestep_embedding/", "timestep"),
        ("", "convolutions"),
    ),
    mesh_rules=(*_UNET_RULES, *tables.RESNET_ENCODER_RULES, *tables.WHOLE),
    interfaces={
        "action": (
            "noise_pred_net/down_0_0/block1/conv/kernel",
            "noise_pred_net/down_0_0/shortcut/kernel",
            "noise_pred_net/output/kernel",
        ),
        "low_dim": ("noise_pred_net/*/film/kernel",),
    },
    misfits={
        "noise_pred_net/*/film/kernel": (
            "The FiLM kernels read the condition, whose width follows from views, frames, low-dim keys and text."
        ),
    },
    pretrained=_PRETRAINED,
)


def tree(config: ConfigDict) -> TreeInfo:
    """About the parameters of the predictor that a config names."""
    text = tables.text_interface(config.model.encoder.use_language)
    if config.model.predictor == "unet":
        return dataclasses.replace(_UNET, interfaces={**_UNET.interfaces, **text})
    return TreeInfo(
        gradient_groups=(*tables.RESNET_ENCODER_GROUPS, *tables.ADALN_TRANSFORMER_GROUPS),
        mesh_rules=(*tables.ADALN_TRANSFORMER_RULES, *tables.RESNET_ENCODER_RULES, *tables.WHOLE),
        interfaces={
            "action": tables.ACTION_INTERFACE,
            "low_dim": tables.condition_interface(config.model.adaln),
            **text,
        },
        misfits={
            "noise_pred_net/pos_embed": (
                "The position embedding has a row for each action, so that another number of actions "
                "(config.data.window.action) changes it alone."
            ),
            **tables.ADALN_MISFITS,
        },
        pretrained=_PRETRAINED,
    )
