"""Rotations by scipy, and those that are hard to represent: what the tests of rotations and of transforms share."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation


def by_scipy(name: str, x: np.ndarray) -> Rotation:
    """The same rotations by scipy, an independent implementation."""
    if name == "rot6d":
        rows = x.reshape(-1, 2, 3)
        return Rotation.from_matrix(np.concatenate([rows, np.cross(rows[:, :1], rows[:, 1:])], axis=1))
    return {
        "euler": lambda: Rotation.from_euler("XYZ", x),
        "rpy": lambda: Rotation.from_euler("xyz", x),
        "axis_angle": lambda: Rotation.from_rotvec(x),
        "quaternion_xyzw": lambda: Rotation.from_quat(x),
        "quaternion_wxyz": lambda: Rotation.from_quat(x, scalar_first=True),
    }[name]()


def numbers_of(name: str, r: Rotation) -> np.ndarray:
    return {
        "euler": lambda: r.as_euler("XYZ"),
        "rpy": lambda: r.as_euler("xyz"),
        "axis_angle": r.as_rotvec,
        "quaternion_xyzw": r.as_quat,
        "quaternion_wxyz": lambda: r.as_quat(scalar_first=True),
        "rot6d": lambda: r.as_matrix()[:, :2].reshape(-1, 6),
    }[name]()


def special_rotations(name: str) -> np.ndarray:
    """(n, width) random rotations, and those at which a representation is ambiguous or loses precision: no turn, turns
    by pi about every axis, angles of +-pi, a locked gimbal at b = +-pi/2 and close to it, q and -q."""
    rng = np.random.default_rng(0)
    tiny = [0.0, 1e-9, 1e-7, 1e-4]
    angles = [rng.uniform(-np.pi, np.pi, (200, 3))]
    angles += [[[a, b, c]] for a in (-np.pi, -0.3, 0.0, np.pi) for b in (0.0, np.pi, -np.pi) for c in (-np.pi, 2.0)]
    angles += [
        [[a, s * (np.pi / 2 - e), c]] for a in (0.0, 0.4, np.pi) for s in (1, -1) for e in tiny for c in (0, 0.3)
    ]
    axes = np.concatenate([rng.normal(size=(30, 3)), np.eye(3), -np.eye(3), [[1, 1, 0], [0, -1, 1]]])
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    turns = [axes * (np.pi - e) for e in tiny] + [axes * e for e in tiny]
    if name in ("euler", "rpy"):
        return np.concatenate([np.concatenate(angles), numbers_of(name, Rotation.from_rotvec(np.concatenate(turns)))])
    every = Rotation.concatenate(
        [Rotation.from_euler("XYZ", np.concatenate(angles)), *map(Rotation.from_rotvec, turns)]
    )
    x = numbers_of(name, every)
    if name == "axis_angle":
        return np.concatenate([x, np.concatenate(turns), 5 * axes])  # beyond pi too
    return np.concatenate([x, -x, 0.1 * x]) if name.startswith("quaternion") else x


def apart(a: Rotation, b: Rotation) -> float:
    """The largest angle, radians, between rotations in SO(3)."""
    return float((a.inv() * b).magnitude().max())
