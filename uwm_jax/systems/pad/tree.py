"""PAD's parameters by name: how they lie on a mesh, and what they belong to; patterns and entries are as in
`systems/uwm/tree.py`, whose rules hold for these blocks too."""

from __future__ import annotations

from uwm_jax.systems.base import TreeInfo
from uwm_jax.systems.uwm import tree

TREE = TreeInfo(
    gradient_groups=tuple(pair for pair in tree.TREE.gradient_groups if pair[1] != "obs_encoder"),
    mesh_rules=tuple(rule for rule in tree.MESH_RULES if not rule[0].startswith("obs_encoder/")),
    interfaces={key: tree.TREE.interfaces[key] for key in ("action", "next_obs")},
    codec="next_obs",
    misfits={
        "noise_pred_net/pos_embed": (
            "The position embedding has a row for each action and video token, so that another number of actions "
            "(config.data.window.action) changes it and noise_pred_net/pad_tokens alone."
        ),
    },
)
