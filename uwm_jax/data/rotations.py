"""Representations of rotations, vectorised over leading axes."""

from __future__ import annotations

import numpy as np


def xyz_euler_to_rot6d(x: np.ndarray) -> np.ndarray:
    """Position and Euler angles to position and the first two rows of the rotation.

    Args:
        x: (..., 6) xyz and radians (a, b, c), meaning R = Rx(a) Ry(b) Rz(c) (intrinsic XYZ).
    Returns:
        (..., 9) float32: xyz, row 0 of R, row 1 of R (Zhou et al., arXiv:1812.07035, uses columns).
    """
    angles = np.asarray(x[..., 3:6], np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    ca, cb, cc = cos[..., 0], cos[..., 1], cos[..., 2]
    sa, sb, sc = sin[..., 0], sin[..., 1], sin[..., 2]
    out = np.empty((*angles.shape[:-1], 9), np.float32)
    out[..., :3] = x[..., :3]
    out[..., 3], out[..., 4], out[..., 5] = cb * cc, -cb * sc, sb
    out[..., 6], out[..., 7], out[..., 8] = ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb
    return out


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
    x = np.asarray(x, np.float64)
    r0 = _unit(x[..., 3:6])
    r1 = _unit(x[..., 6:9] - np.sum(r0 * x[..., 6:9], axis=-1, keepdims=True) * r0)
    r = np.stack([r0, r1, np.cross(r0, r1)], axis=-2)
    if convention == "extrinsic":
        # The extrinsic angles of R are, negated, the intrinsic angles of its transpose.
        return np.concatenate([x[..., :3], -_intrinsic_xyz(np.swapaxes(r, -1, -2))], axis=-1).astype(np.float32)
    return np.concatenate([x[..., :3], _intrinsic_xyz(r)], axis=-1).astype(np.float32)


def _intrinsic_xyz(r: np.ndarray) -> np.ndarray:
    """(a, b, c) of R = Rx(a) Ry(b) Rz(c); where b = +-pi/2 fixes only a sum of a and c, c is 0."""
    b = np.arcsin(np.clip(r[..., 0, 2], -1.0, 1.0))
    locked = np.hypot(r[..., 0, 0], r[..., 0, 1]) < 1e-9
    a = np.where(locked, np.arctan2(r[..., 2, 1], r[..., 1, 1]), np.arctan2(-r[..., 1, 2], r[..., 2, 2]))
    c = np.where(locked, 0.0, np.arctan2(-r[..., 0, 1], r[..., 0, 0]))
    return np.stack([a, b, c], axis=-1)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)
