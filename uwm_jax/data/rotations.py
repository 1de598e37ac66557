"""Representations of rotations, vectorised over leading axes: each to and from matrices.

Matrices R map a vector's coordinates in the rotated frame to those in the fixed one. All functions compute in float64.
Every representation reaches all rotations, and a round trip gives the same rotation, though not always the same
numbers: angles differ by turns, and at a locked gimbal, at a turn by pi, and for q and -q several numbers mean one
rotation. Networks are trained on `rot6d`, which is continuous (Zhou et al., arXiv:1812.07035).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A representation of rotations in `width` numbers.

    Attributes:
        to_matrix: (..., width) -> (..., 3, 3).
        from_matrix: (..., 3, 3) -> (..., width).
        is_none: (..., width) -> (...) bool, finite numbers that mean no rotation; None where all mean one.
    """

    width: int
    to_matrix: Callable[[np.ndarray], np.ndarray]
    from_matrix: Callable[[np.ndarray], np.ndarray]
    is_none: Callable[[np.ndarray], np.ndarray] | None = None


def _from_euler(angles: np.ndarray) -> np.ndarray:
    """R = Rx(a) Ry(b) Rz(c)."""
    angles = np.asarray(angles, np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    ca, cb, cc = cos[..., 0], cos[..., 1], cos[..., 2]
    sa, sb, sc = sin[..., 0], sin[..., 1], sin[..., 2]
    r = np.empty((*angles.shape[:-1], 3, 3))
    r[..., 0, 0], r[..., 0, 1], r[..., 0, 2] = cb * cc, -cb * sc, sb
    r[..., 1, 0], r[..., 1, 1], r[..., 1, 2] = ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb
    r[..., 2, 0], r[..., 2, 1], r[..., 2, 2] = sa * sc - ca * sb * cc, sa * cc + ca * sb * sc, ca * cb
    return r


def _to_euler(r: np.ndarray) -> np.ndarray:
    """(a, b, c) with b in [-pi/2, pi/2].

    Where b = +-pi/2 only a sum of a and c is determined. There c is whatever rounding leaves of the first row, and a is
    the angle that remains of R once b and c are known, so that the three give R at every b.
    """
    b = np.arctan2(r[..., 0, 2], np.hypot(r[..., 0, 0], r[..., 0, 1]))
    c = np.arctan2(-r[..., 0, 1], r[..., 0, 0])
    sc, cc = np.sin(c), np.cos(c)
    # The second column of R Rz(c)^T = Rx(a) Ry(b) is (0, cos a, sin a).
    a = np.arctan2(r[..., 2, 0] * sc + r[..., 2, 1] * cc, r[..., 1, 0] * sc + r[..., 1, 1] * cc)
    return np.stack([a, b, c], axis=-1)


def _from_rpy(angles: np.ndarray) -> np.ndarray:
    """R = Rz(c) Ry(b) Rx(a), whose transpose has the negated angles in the other order."""
    return np.swapaxes(_from_euler(-np.asarray(angles, np.float64)), -1, -2)


def _to_rpy(r: np.ndarray) -> np.ndarray:
    return -_to_euler(np.swapaxes(r, -1, -2))


def _from_quaternion(q: np.ndarray) -> np.ndarray:
    """Of (x, y, z, w) of any length but 0."""
    q = _unit(np.asarray(q, np.float64))
    x, y, z, w = (q[..., i] for i in range(4))
    r = np.empty((*q.shape[:-1], 3, 3))
    r[..., 0, 0], r[..., 0, 1], r[..., 0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    r[..., 1, 0], r[..., 1, 1], r[..., 1, 2] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    r[..., 2, 0], r[..., 2, 1], r[..., 2, 2] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    return r


def _to_quaternion(r: np.ndarray) -> np.ndarray:
    """(x, y, z, w) with w >= 0.

    R determines all products of two components, 4 q q^T; its row with the largest diagonal is q but for its length,
    without cancellation (Shepperd, 1978).
    """
    products = np.empty((*r.shape[:-2], 4, 4))
    diagonal = np.einsum("...ii->...i", r)
    total = diagonal.sum(axis=-1)
    for i in range(3):
        products[..., i, i] = 1 + 2 * diagonal[..., i] - total
        j, k = (i + 1) % 3, (i + 2) % 3
        products[..., i, j] = products[..., j, i] = r[..., i, j] + r[..., j, i]
        products[..., i, 3] = products[..., 3, i] = r[..., k, j] - r[..., j, k]
    products[..., 3, 3] = 1 + total
    largest = np.argmax(np.einsum("...ii->...i", products), axis=-1)
    q = _unit(np.take_along_axis(products, largest[..., None, None], axis=-2)[..., 0, :])
    return np.where(q[..., 3:] < 0, -q, q)


def _from_axis_angle(v: np.ndarray) -> np.ndarray:
    """Of an axis times its angle in radians."""
    v = np.asarray(v, np.float64)
    half = np.linalg.norm(v, axis=-1, keepdims=True) / 2
    return _from_quaternion(np.concatenate([v / 2 * np.sinc(half / np.pi), np.cos(half)], axis=-1))


def _to_axis_angle(r: np.ndarray) -> np.ndarray:
    """With an angle of at most pi."""
    q = _to_quaternion(r)
    length = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    small = length < 1e-12
    factor = np.where(small, 2.0, 2 * np.arctan2(length, q[..., 3:]) / np.where(small, 1.0, length))
    return q[..., :3] * factor


def _from_rot6d(x: np.ndarray) -> np.ndarray:
    """Of two rows, which Gram-Schmidt makes orthonormal; NaN where they are parallel or zero."""
    x = np.asarray(x, np.float64)
    r0 = _unit(x[..., :3])
    r1 = _unit(x[..., 3:] - np.sum(r0 * x[..., 3:], axis=-1, keepdims=True) * r0)
    return np.stack([r0, r1, np.cross(r0, r1)], axis=-2)


def _to_rot6d(r: np.ndarray) -> np.ndarray:
    return r[..., :2, :].reshape(*r.shape[:-2], 6)


def _unit(v: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):  # a vector of length 0 has no direction: NaN
        return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _all_zero(q: np.ndarray) -> np.ndarray:
    return ~np.any(q, axis=-1)


ROTATIONS = {
    # Intrinsic XYZ angles, radians, R = Rx(a) Ry(b) Rz(c), as the official UWM code reads DROID's.
    "euler": Rotation(3, _from_euler, _to_euler),
    # Roll, pitch, yaw about fixed axes, radians, R = Rz(c) Ry(b) Rx(a): scipy's "xyz", as robots record poses.
    "rpy": Rotation(3, _from_rpy, _to_rpy),
    # Axis times angle, radians (a rotation vector).
    "axis_angle": Rotation(3, _from_axis_angle, _to_axis_angle),
    "quaternion_xyzw": Rotation(4, _from_quaternion, _to_quaternion, _all_zero),
    "quaternion_wxyz": Rotation(
        4,
        lambda q: _from_quaternion(np.roll(q, -1, axis=-1)),
        lambda r: np.roll(_to_quaternion(r), 1, axis=-1),
        _all_zero,
    ),
    # The first two rows of R.
    "rot6d": Rotation(6, _from_rot6d, _to_rot6d, lambda x: ~np.isfinite(_from_rot6d(x)).all(axis=(-2, -1))),
}


def xyz_euler_to_rot6d(x: np.ndarray) -> np.ndarray:
    """Position and Euler angles to position and the first two rows of the rotation.

    Args:
        x: (..., 6) xyz and radians (a, b, c), meaning R = Rx(a) Ry(b) Rz(c) (intrinsic XYZ).
    Returns:
        (..., 9) float32: xyz, row 0 of R, row 1 of R (Zhou et al., arXiv:1812.07035, uses columns).
    """
    return np.concatenate([x[..., :3], _to_rot6d(_from_euler(x[..., 3:]))], axis=-1).astype(np.float32)


def rot6d_to_xyz_euler(x: np.ndarray, convention: str = "intrinsic") -> np.ndarray:
    """Inverse of `xyz_euler_to_rot6d`; the six numbers need not be orthonormal (Gram-Schmidt).

    Args:
        x: (..., 9) xyz and two rows of a rotation.
        convention: "intrinsic" is the true inverse, with b in [-pi/2, pi/2]; "extrinsic" reads the angles
            of R = Rz(c) Ry(b) Rx(a) instead, as the official UWM deployment does.
    Returns:
        (..., 6) float32 xyz and radians.
    """
    if convention not in ("intrinsic", "extrinsic"):
        raise ValueError(f"expected convention 'intrinsic' or 'extrinsic', found {convention!r}")
    angles = ROTATIONS["euler" if convention == "intrinsic" else "rpy"].from_matrix(_from_rot6d(x[..., 3:]))
    return np.concatenate([x[..., :3], angles], axis=-1).astype(np.float32)
