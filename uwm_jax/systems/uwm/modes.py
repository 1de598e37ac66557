"""The one idea of the paper as a table: a mode is a role for each modality.

Each modality has its own diffusion timestep. At the noisiest timestep it carries no information, so it is
marginalised; at timestep 0 it is clean, so it is conditioned on; in between it is being generated
(Unified World Models, sections III-B and III-C). Training draws both timesteps independently, which
is what makes every row of the table a query to the same weights.

The loss, the sampler, the evaluation and the exports all read this table.
"""

from __future__ import annotations

from uwm_jax.diffusion.roles import Role, generated, given
from uwm_jax.systems.base import Use

MODALITIES = ("action", "next_obs")

MODES: dict[str, dict[str, Role]] = {
    "policy": {"action": Role.GENERATE, "next_obs": Role.HIDDEN},  # p(a | o)
    "video": {"action": Role.HIDDEN, "next_obs": Role.GENERATE},  # p(o' | o)
    "forward": {"action": Role.GIVEN, "next_obs": Role.GENERATE},  # p(o' | o, a)
    "inverse": {"action": Role.GENERATE, "next_obs": Role.GIVEN},  # p(a | o, o')
    "joint": {"action": Role.GENERATE, "next_obs": Role.GENERATE},  # p(a, o' | o)
}

_QUESTIONS = {
    "policy": "what to do, seeing now",
    "video": "what will be seen, whatever is done",
    "forward": "what will be seen, after these actions",
    "inverse": "what was done, seeing now and later",
    "joint": "what to do and what will be seen",
}

USES = {mode: Use(generated(roles), given(roles), _QUESTIONS[mode]) for mode, roles in MODES.items()}
ACTING = "policy"

ACTION_FREE_MODE = "video"  # how a training row without actions is treated
