"""Roles of a modality in one query: what its diffusion timestep says about it (Unified World Models, section III)."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Role(enum.Enum):
    GENERATE = "generate"  # denoised from pure noise; in training: a random timestep, and a loss
    GIVEN = "given"  # clean, at timestep 0
    HIDDEN = "hidden"  # pure noise at the noisiest timestep, which carries no information


Roles = Mapping[str, Role]


def generated(roles: Roles) -> tuple[str, ...]:
    """The modalities that are sampled."""
    return tuple(m for m, role in roles.items() if role is Role.GENERATE)


def given(roles: Roles) -> tuple[str, ...]:
    """The modalities that are conditioned on, besides the observation."""
    return tuple(m for m, role in roles.items() if role is Role.GIVEN)
