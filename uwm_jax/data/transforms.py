"""Named transforms of actions, vectorised over leading axes, each with its inverse.

`config.data.action` lists pairs (columns, transform). Columns are a step key, or a part of it: `action`, `action[:6]`.
A transform is one of

    identity                              the numbers as they are
    gripper_inverted                      1 - g: swaps open and closed where these are 0 and 1
    gripper_scaled:LOW:HIGH               maps LOW to 0 and HIGH to 1; LOW may be the larger
    <rotation>_to_rot6d                   a rotation as the first two rows of its matrix (`data.rotations`)
    xyz_<rotation>_to_rot6d               the same of a pose: a position, which stays, and a rotation
    relative:<columns>[:<rotation>[:<rotation>]]
                                          a pose p_k, R_k relative to the pose p_s, R_s that these columns hold at the
                                          window's present step s: p_k - p_s and R_s^T R_k, as position and rot6d

<rotation> is euler, rpy, axis_angle, quaternion_xyzw, quaternion_wxyz or (not for `_to_rot6d`) rot6d. That of
`relative` is the representation of both poses, `euler` unless stated, or, where two are stated, of the action's and of
the state's; `position` stands for vectors without a rotation, of any width, such as joint angles.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from uwm_jax.data.rotations import ROTATIONS, Rotation
from uwm_jax.errors import UserError, suggest

_FIELD = "config.data.action"
_POSITION = "position"
_Map = Callable[[np.ndarray, np.ndarray | None], np.ndarray]

# The actions of datasets of the field: position, rotation as rot6d, and a gripper that is 0 open and 1 closed, ten
# numbers. Each reads a rotation as its dataset has it; the units of position and rotation stay those of the dataset.
PRESETS = {
    # BridgeData V2 (arXiv:2308.12952), RLDS: metres and radians of a step about fixed axes; its gripper is 1 open.
    "bridge": (("action[:6]", "xyz_rpy_to_rot6d"), ("action[6:]", "gripper_inverted")),
    # DROID (arXiv:2403.12945), RLDS, as the paper of UWM reads it (arXiv:2504.02792): velocities as shares of the
    # largest step, and the commanded gripper, 0 open and 1 closed.
    "droid": (
        ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"),
        ("action_dict/gripper_position", "identity"),
    ),
    # LIBERO (arXiv:2306.03310), and robomimic's OSC_POSE: a step as a share of 5 cm and of 0.5 rad, its rotation as
    # axis times angle; its gripper is -1 open and 1 closed.
    "libero": (("action[:6]", "xyz_axis_angle_to_rot6d"), ("action[6:]", "gripper_scaled:-1:1")),
}


def preset(name: str) -> tuple[tuple[str, str], ...]:
    """The value of `config.data.action`, or of a source's `action`, for a dataset of the field.

    Args:
        name: "bridge", "droid" or "libero".
    Returns:
        Pairs (columns, transform) that make 10-d actions: position (3), rot6d (6), gripper (1; 0 open, 1 closed).
    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r} of {_FIELD}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


class Columns(NamedTuple):
    """A step key, or the columns [start:stop] of it, as a slice counts them."""

    key: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str, field: str = _FIELD) -> Columns:
        """From `key` or `key[start:stop]`.

        Raises:
            UserError: it is neither.
        """
        match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d*):(-?\d*)\])?", text)
        if not match or "-" in match.groups():
            raise UserError(f"{field}: expected a step key, or columns of it such as 'action[:6]', found {text!r}.")
        start, stop = (int(n) if n else None for n in match.groups()[1:])
        return cls(match[1], start, stop)

    def __str__(self) -> str:
        if self.start is None and self.stop is None:
            return self.key
        start, stop = ("" if n is None else n for n in self[1:])
        return f"{self.key}[{start}:{stop}]"

    def of(self, values: np.ndarray) -> np.ndarray:
        """These columns of (..., D) values."""
        return values[..., self.start : self.stop]

    def width(self, dim: int, field: str = _FIELD) -> int:
        """Their number, of a key of `dim` numbers; raises UserError where it lacks some of them."""
        taken = len(range(dim)[self.start : self.stop])
        if not taken or any(n is not None and abs(n) > dim for n in (self.start, self.stop)):
            raise UserError(f"{field}: {self} takes columns that {self.key!r}, of {dim} numbers, does not have.")
        return taken


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named, invertible map of in_dim numbers to out_dim; None means any width, which stays.

    Attributes:
        name: as the config has it.
        state: the columns whose values at the present step it needs as well; None for most.
        state_dim: their number; None: as many as the action's.
        rotation, state_rotation: what the last numbers of the action, and of the state, mean; None: no rotation.
    """

    name: str
    forward: _Map = dataclasses.field(compare=False)
    backward: _Map = dataclasses.field(compare=False)
    in_dim: int | None = None
    out_dim: int | None = None
    state: Columns | None = None
    state_dim: int | None = None
    rotation: Rotation | None = dataclasses.field(default=None, compare=False)
    state_rotation: Rotation | None = dataclasses.field(default=None, compare=False)

    def apply(self, x: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The model's numbers of recorded ones.

        Args:
            x: (..., in_dim), with `state` (..., T, in_dim).
            state: (..., state_dim) of the present step, for a transform that has `state`.
        Returns:
            (..., out_dim) float32; NaN where a rotation is none, such as a quaternion of zeros.
        """
        return np.asarray(self.forward(x, state), np.float32)

    def invert(self, y: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The recorded numbers of (..., out_dim), (..., in_dim) float32: of a rotation, numbers that mean the same one
        (`data.rotations`), whose six numbers need not be orthonormal."""
        return np.asarray(self.backward(y, state), np.float32)

    def width(self, key: str, dim: int) -> int:
        """Width of the result for `dim` numbers of a step key; raises UserError if it does not fit."""
        if self.in_dim is not None and dim != self.in_dim:
            raise UserError(f"{_FIELD}: {self.name!r} takes {self.in_dim} numbers, but {key!r} has {dim}.")
        return dim if self.out_dim is None else self.out_dim

    def with_state(self, key: str) -> Transform:
        """The same transform of a state that is called `key`."""
        assert self.state is not None
        rotations = self.name.removeprefix(f"relative:{self.state}")
        return get_transform(f"relative:{self.state._replace(key=key)}{rotations}")

    def check_state(self, dim: int, state_dim: int) -> None:
        """Raises UserError where the state has another width than a transform of `dim` numbers needs."""
        expected = dim if self.state_dim is None else self.state_dim
        if self.state is not None and state_dim != expected:
            raise UserError(
                f"{_FIELD}: {self.name!r} needs a state of {expected} numbers, but {str(self.state)!r} has {state_dim}."
                " Name the columns of the pose, and the representation of its rotation: 'relative:state[:6]:rpy'."
            )


def parse(pairs: Iterable[tuple[str, str]], field: str = _FIELD) -> list[tuple[Columns, Transform]]:
    """The columns and transforms of `config.data.action`, or of a source's.

    Raises:
        UserError: a pair is not as the module describes; it names `field`.
    """
    return [(Columns.parse(columns, field), get_transform(name, field)) for columns, name in pairs]


def get_transform(name: str, field: str = _FIELD) -> Transform:
    """The transform of this name; raises UserError for an unknown one, or for arguments that it does not take."""
    if name in _PLAIN:
        return _PLAIN[name]
    kind, _, arguments = name.partition(":")
    if kind == "gripper_scaled":
        return _gripper_scaled(name, arguments, field)
    if kind == "relative":
        return _relative(name, arguments, field)
    known = [*_PLAIN, "gripper_scaled:LOW:HIGH", "relative:<key>"]
    raise UserError(f"{field}: no transform {name!r}; there are {', '.join(known)}.{suggest(name, known)}")


def _pose(rotation: Rotation, position: int) -> tuple[_Map, _Map]:
    """Between numbers of which those after `position` are a rotation, and the same with rot6d."""

    def convert(x: np.ndarray, one: Rotation, other: Rotation) -> np.ndarray:
        rotated = other.from_matrix(one.to_matrix(x[..., position:]))
        return np.concatenate([x[..., :position], rotated], axis=-1) if position else rotated

    rot6d = ROTATIONS["rot6d"]
    return lambda x, _: convert(x, rotation, rot6d), lambda y, _: convert(y, rot6d, rotation)


def _plain() -> dict[str, Transform]:
    """The transforms that take no argument, by name."""
    made = [
        Transform("identity", lambda x, _: x, lambda y, _: y),
        Transform("gripper_inverted", _inverted, _inverted),
    ]
    for prefix, position in (("xyz_", 3), ("", 0)):
        for name, rotation in ROTATIONS.items():
            if name != "rot6d":
                sizes = position + rotation.width, position + 6
                maps = _pose(rotation, position)
                made.append(Transform(f"{prefix}{name}_to_rot6d", *maps, *sizes, rotation=rotation))
    return {t.name: t for t in made}


def _inverted(x: np.ndarray, _: np.ndarray | None) -> np.ndarray:
    return 1 - np.asarray(x, np.float64)  # in bytes, as some datasets record a gripper, 1 - 2 is 255


_PLAIN = _plain()


def _gripper_scaled(name: str, arguments: str, field: str) -> Transform:
    try:
        low, high = map(float, arguments.split(":"))
        fits = low != high and math.isfinite(low) and math.isfinite(high)
    except ValueError:
        fits = False
    if not fits:
        raise UserError(
            f"{field}: expected 'gripper_scaled:LOW:HIGH' with two different numbers, of which LOW becomes 0 and HIGH "
            f"becomes 1, such as 'gripper_scaled:-1:1'; found {name!r}."
        )
    return Transform(
        name,
        lambda x, _: (np.asarray(x, np.float64) - low) / (high - low),
        lambda y, _: np.asarray(y, np.float64) * (high - low) + low,
    )


def _relative(name: str, arguments: str, field: str) -> Transform:
    match = re.fullmatch(r"([^\[\]:]+(?:\[[^\]]*\])?)(?::(\w+))?(?::(\w+))?", arguments)
    kinds = (*ROTATIONS, _POSITION)
    of_action = (match[2] or "euler") if match else ""
    of_state = (match[3] or of_action) if match else ""
    one_is_bare = (of_action == _POSITION) != (of_state == _POSITION)
    if not match or of_action not in kinds or of_state not in kinds or one_is_bare:
        raise UserError(
            f"{field}: expected 'relative:<key>' or 'relative:<key>:<rotation>', where the key holds the pose that the "
            f"actions are relative to and the rotation is {', '.join(kinds[:-1])}, or {_POSITION} for vectors without "
            f"one, such as 'relative:state[:6]:rpy'; found {name!r}."
        )
    state = Columns.parse(match[1], field)
    name = ":".join(("relative", str(state), *(rotation for rotation in match.groups()[1:] if rotation)))
    if of_action == _POSITION:
        return Transform(
            name,
            lambda x, s: np.asarray(x, np.float64) - _beside_chunk(s),
            lambda y, s: np.asarray(y, np.float64) + _beside_chunk(s),
            state=state,
        )
    rotation, fixed, rot6d = ROTATIONS[of_action], ROTATIONS[of_state], ROTATIONS["rot6d"]

    def forward(x: np.ndarray, s: np.ndarray | None) -> np.ndarray:
        s = _beside_chunk(s)
        turned = np.swapaxes(fixed.to_matrix(s[..., 3:]), -1, -2) @ rotation.to_matrix(x[..., 3:])
        return np.concatenate([x[..., :3] - s[..., :3], rot6d.from_matrix(turned)], axis=-1)

    def backward(y: np.ndarray, s: np.ndarray | None) -> np.ndarray:
        s = _beside_chunk(s)
        turned = fixed.to_matrix(s[..., 3:]) @ rot6d.to_matrix(y[..., 3:])
        return np.concatenate([y[..., :3] + s[..., :3], rotation.from_matrix(turned)], axis=-1)

    return Transform(name, forward, backward, 3 + rotation.width, 9, state, 3 + fixed.width, rotation, fixed)


def _beside_chunk(state: np.ndarray | None) -> np.ndarray:
    """A state (..., D) of the present as (..., 1, D), which all actions of a chunk share."""
    assert state is not None
    return np.asarray(state, np.float64)[..., None, :]
