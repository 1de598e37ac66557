"""The parameters of PAD by name: how they lie on a mesh, and what they belong to."""

from __future__ import annotations

from uwm_jax.systems import tables
from uwm_jax.systems.base import TreeInfo

TREE = TreeInfo(
    gradient_groups=tables.ADALN_TRANSFORMER_GROUPS,
    mesh_rules=(*tables.ADALN_TRANSFORMER_RULES, *tables.WHOLE),
    interfaces={
        "action": tables.ACTION_INTERFACE,
        "next_obs": ("noise_pred_net/patch_encoder/kernel", "noise_pred_net/patch_decoder/kernel"),
    },
    codec="next_obs",
    misfits={
        "noise_pred_net/pos_embed": (
            "The position embedding has a row for each action and video token, so that another number of actions "
            "(config.data.window.action) changes it and noise_pred_net/pad_tokens alone."
        ),
    },
)
