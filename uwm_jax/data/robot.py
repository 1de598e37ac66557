"""The actions of a robot, as a dataset records them and a controller takes them, and those that a model learns.

`config.data.action` makes the one of the other (`data.transforms`), and `RobotActions` knows the way back. It travels
in `DataSpec`, so that a policy of a checkpoint acts in the robot's own convention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from uwm_jax.data.transforms import Columns, Transform, get_transform
from uwm_jax.errors import UserError


class Part(NamedTuple):
    """One part of an action: columns of a step key, their number, and the transform that they go through."""

    columns: Columns
    transform: Transform
    in_dim: int

    @property
    def out_dim(self) -> int:
        return self.transform.width(str(self.columns), self.in_dim)


@dataclasses.dataclass(frozen=True)
class RobotActions:
    """The actions of one robot.

    The robot's action is all parts' recorded numbers, joined in the order of the parts; the model's is what their
    transforms make of them.

    Attributes:
        parts: as `config.data.action` lists them; `Transform.state` names a key of `states`.
        states: {key of an observation: D} of the states that relative parts refer to, in raw units.
    """

    parts: tuple[Part, ...]
    states: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """Numbers of the robot's action."""
        return sum(part.in_dim for part in self.parts)

    @property
    def model_width(self) -> int:
        """Numbers of the model's action."""
        return sum(part.out_dim for part in self.parts)

    def to_model(self, actions: np.ndarray, states: Mapping[str, np.ndarray]) -> np.ndarray:
        """The model's actions.

        Args:
            actions: (..., T, width) of the robot.
            states: {key of `states`: (..., D)} of the present step, that of the newest observed frame.
        Returns:
            (..., T, model_width) float32, raw units.
        """
        pieces = zip(self.parts, _split(actions, [part.in_dim for part in self.parts]), strict=True)
        return np.concatenate([part.transform.apply(x, _state(part, states)) for part, x in pieces], axis=-1)

    def to_robot(self, actions: np.ndarray, states: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `to_model`: (..., T, width) float32; rotations as numbers that mean the same rotation."""
        pieces = zip(self.parts, _split(actions, [part.out_dim for part in self.parts]), strict=True)
        return np.concatenate([part.transform.invert(y, _state(part, states)) for part, y in pieces], axis=-1)

    def is_like(self, other: RobotActions) -> bool:
        """Whether both turn a model's action into a robot's in the same way, from whatever step keys they were read."""
        parts = [[(part.transform.name, part.in_dim) for part in robot.parts] for robot in (self, other)]
        return parts[0] == parts[1] and self.states == other.states

    def to_json(self) -> dict[str, Any]:
        parts = [{"columns": str(p.columns), "transform": p.transform.name, "width": p.in_dim} for p in self.parts]
        return {"parts": parts, "states": dict(self.states)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RobotActions:
        """As `to_json` wrote it; raises ValueError for parts that do not fit together."""
        states = {str(key): int(width) for key, width in stored["states"].items()}
        parts = []
        try:
            for entry in stored["parts"]:
                part = Part(Columns.parse(entry["columns"]), get_transform(entry["transform"]), int(entry["width"]))
                if part.out_dim < 1:
                    raise ValueError(f"a part of an action should have 1 number or more, found {part.in_dim}")
                if state := part.transform.state:
                    part.transform.check_state(part.in_dim, state.width(states[state.key]))
                parts.append(part)
        except UserError as e:
            raise ValueError(str(e)) from e
        return cls(tuple(parts), states)


def parse_limits(text: str, width: int, flag: str = "--limits") -> tuple[np.ndarray, np.ndarray]:
    """Stated bounds of a robot's actions, `LOW:HIGH,LOW:HIGH,...`: one pair for each column, or one for all.

    Args:
        width: numbers of the action.
        flag: names the text in messages.
    Returns:
        (low, high), each (width,) float32 in the robot's units; -inf and inf where a side of a pair is empty.
    Raises:
        UserError: it is not so, or a low bound exceeds its high one.
    """
    pairs = [part.split(":") for part in text.split(",")]
    try:
        low, high = np.transpose([[float(a or "-inf"), float(b or "inf")] for a, b in pairs]).astype(np.float32)
        fits = len(low) in (1, width) and bool((low <= high).all())
    except ValueError:
        fits = False
    if not fits:
        raise UserError(
            f"{flag}={text}: expected LOW:HIGH for all {width} columns of the robot's action, or {width} such pairs "
            "with LOW <= HIGH, separated by commas; an empty side is no bound: 0:512 or -1:1,-1:1,0:."
        )
    return np.broadcast_to(low, width).copy(), np.broadcast_to(high, width).copy()


def _split(actions: np.ndarray, widths: list[int]) -> list[np.ndarray]:
    if len(widths) == 1:  # which is most robots, and split takes as long as all else
        return [actions]
    return np.split(actions, np.cumsum(widths)[:-1], axis=-1)


def _state(part: Part, states: Mapping[str, np.ndarray]) -> np.ndarray | None:
    state = part.transform.state
    return None if state is None else state.of(states[state.key])
