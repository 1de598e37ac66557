"""The one idea of the paper as a table: a mode is a role for each modality.

Each modality has its own diffusion timestep. At the noisiest timestep a modality says nothing, so it
is marginalised; at timestep 0 it is clean, so it is conditioned on; in between it is being generated
(Unified World Models, sections III-B and III-C). Training draws both timesteps independently, which
is what makes every row of the table a query to the same weights.

The loss, the sampler, the sample command and the evaluation all read this table.
"""

from __future__ import annotations

import enum

MODALITIES = ("action", "next_obs")


class Role(enum.Enum):
    GENERATE = "generate"  # denoised from pure noise; in training: a random timestep, and a loss
    GIVEN = "given"  # clean, at timestep 0
    HIDDEN = "hidden"  # pure noise at the noisiest timestep


MODES: dict[str, dict[str, Role]] = {
    "policy": {"action": Role.GENERATE, "next_obs": Role.HIDDEN},  # p(a | o)
    "video": {"action": Role.HIDDEN, "next_obs": Role.GENERATE},  # p(o' | o)
    "forward": {"action": Role.GIVEN, "next_obs": Role.GENERATE},  # p(o' | o, a)
    "inverse": {"action": Role.GENERATE, "next_obs": Role.GIVEN},  # p(a | o, o')
    "joint": {"action": Role.GENERATE, "next_obs": Role.GENERATE},  # p(a, o' | o)
}

# What a mode asks, in words for reports.
QUESTIONS = {
    "policy": "what to do, seeing now",
    "video": "what will be seen, whatever is done",
    "forward": "what will be seen, after these actions",
    "inverse": "what was done, seeing now and later",
    "joint": "what to do and what will be seen",
}

# How a training row is treated: with its actions, and without any (video).
TRAINING_MODE = "joint"
ACTION_FREE_MODE = "video"


def generated(mode: str) -> tuple[str, ...]:
    """The modalities that a mode samples."""
    return tuple(m for m in MODALITIES if MODES[mode][m] is Role.GENERATE)


def given(mode: str) -> tuple[str, ...]:
    """The modalities that a mode is conditioned on, beside the observation."""
    return tuple(m for m in MODALITIES if MODES[mode][m] is Role.GIVEN)
