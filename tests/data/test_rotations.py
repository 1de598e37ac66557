from __future__ import annotations

import numpy as np
import pytest

from uwm_jax.data.rotations import rot6d_to_xyz_euler, xyz_euler_to_rot6d


def _rotation(axis: int, angle: float) -> np.ndarray:
    r = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    r[i, i] = r[j, j] = np.cos(angle)
    r[i, j], r[j, i] = -np.sin(angle), np.sin(angle)
    return r


def test_published_value() -> None:
    found = xyz_euler_to_rot6d(np.array([1.0, 2.0, 3.0, 0.3, -0.2, 0.5]))
    expected = [1, 2, 3, 0.8601, -0.4699, -0.1987, 0.4065, 0.8665, -0.2896]
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_rows_of_the_product_of_three_rotations() -> None:
    x = np.random.default_rng(0).uniform(-3, 3, (4, 5, 6))
    found = xyz_euler_to_rot6d(x)
    assert found.shape == (4, 5, 9) and found.dtype == np.float32
    for at in np.ndindex(4, 5):
        a, b, c = x[at][3:]
        r = _rotation(0, a) @ _rotation(1, b) @ _rotation(2, c)
        np.testing.assert_allclose(found[at], np.concatenate([x[at][:3], r[0], r[1]]), atol=1e-6)


def test_the_intrinsic_convention_is_the_true_inverse() -> None:
    x = np.random.default_rng(1).uniform(-1.5, 1.5, (1000, 6))
    np.testing.assert_allclose(rot6d_to_xyz_euler(xyz_euler_to_rot6d(x)), x, atol=3e-5)
    scaled = xyz_euler_to_rot6d(x) * np.repeat([1.0, 2.0, 0.5], 3)  # Gram-Schmidt takes lengths out
    np.testing.assert_allclose(rot6d_to_xyz_euler(scaled), x, atol=3e-5)


def test_a_locked_gimbal_gives_the_same_rotation() -> None:
    x = np.array([0, 0, 0, 0.4, np.pi / 2, 0.3])
    rot6d = xyz_euler_to_rot6d(x)
    np.testing.assert_allclose(xyz_euler_to_rot6d(rot6d_to_xyz_euler(rot6d)), rot6d, atol=1e-3)


@pytest.mark.parametrize(
    ("angles", "official"),
    [((0.3, -0.2, 0.5), (0.1779, -0.3133, 0.4415)), ((0.03, -0.02, 0.05), (0.0290, -0.0215, 0.0494))],
)
def test_the_extrinsic_convention_gives_the_official_codes_values(angles, official) -> None:
    rot6d = xyz_euler_to_rot6d(np.array([0, 0, 0, *angles]))
    np.testing.assert_allclose(rot6d_to_xyz_euler(rot6d, convention="extrinsic")[3:], official, atol=1e-4)


def test_extrinsic_angles_rebuild_the_rotation_from_the_fixed_axes() -> None:
    x = np.random.default_rng(2).uniform(-1.2, 1.2, 6)
    rot6d = xyz_euler_to_rot6d(x)
    a, b, c = rot6d_to_xyz_euler(rot6d, "extrinsic")[3:]
    r = _rotation(2, c) @ _rotation(1, b) @ _rotation(0, a)
    np.testing.assert_allclose(np.concatenate([r[0], r[1]]), rot6d[3:], atol=1e-5)
