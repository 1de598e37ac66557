"""Transforms of actions, vectorised over leading axes.

DROID's 10-d action of the paper is `action_dict/cartesian_velocity` through `xyz_euler_to_rot6d`, joined with
`action_dict/gripper_position`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from uwm_jax.data.rotations import xyz_euler_to_rot6d
from uwm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named map (..., in_dim) -> (..., out_dim) float32; None means any width, unchanged."""

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    in_dim: int | None = None
    out_dim: int | None = None

    def width(self, key: str, dim: int) -> int:
        """Width of the result for a step key of width `dim`; raises UserError if it does not fit."""
        if self.in_dim is not None and dim != self.in_dim:
            raise UserError(f"config.data.action: {self.name!r} takes {self.in_dim} numbers, but {key!r} has {dim}.")
        return dim if self.out_dim is None else self.out_dim


TRANSFORMS = {
    t.name: t
    for t in (
        Transform("identity", lambda x: np.asarray(x, np.float32)),
        Transform("xyz_euler_to_rot6d", xyz_euler_to_rot6d, 6, 9),
    )
}


def get_transform(name: str) -> Transform:
    """The transform of this name; raises UserError for an unknown one."""
    if name not in TRANSFORMS:
        raise UserError(f"config.data.action: no transform {name!r}; there are {', '.join(sorted(TRANSFORMS))}.")
    return TRANSFORMS[name]
