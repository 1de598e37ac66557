from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.data.rotation_case import by_scipy, special_rotations
from uwm_jax.data.rotations import ROTATIONS, rot6d_to_xyz_euler, xyz_euler_to_rot6d


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
    np.testing.assert_allclose(xyz_euler_to_rot6d(rot6d_to_xyz_euler(rot6d)), rot6d, atol=1e-6)


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


@pytest.mark.filterwarnings("ignore:Gimbal lock")
@pytest.mark.parametrize("name", sorted(ROTATIONS))
def test_every_representation_means_the_rotation_that_scipy_says(name: str) -> None:
    x, kind = special_rotations(name), ROTATIONS[name]
    r = kind.to_matrix(x)
    assert r.shape == (len(x), 3, 3) and r.dtype == np.float64 and x.shape[1] == kind.width
    np.testing.assert_allclose(r, by_scipy(name, x).as_matrix(), atol=1e-14)
    np.testing.assert_allclose(kind.to_matrix(x.reshape(2, -1, kind.width)).reshape(-1, 3, 3), r, atol=1e-15)


@pytest.mark.filterwarnings("ignore:Gimbal lock")
@pytest.mark.parametrize("name", sorted(ROTATIONS))
@pytest.mark.parametrize("rounded", [False, True])
def test_a_matrix_comes_back_as_the_same_rotation(name: str, rounded: bool) -> None:
    """In SO(3); also from a rotation that went through float32, whose rows are not quite orthonormal."""
    kind = ROTATIONS[name]
    r = kind.to_matrix(special_rotations(name))
    given = ROTATIONS["rot6d"].to_matrix(r[:, :2].reshape(-1, 6).astype(np.float32)) if rounded else r
    found = kind.from_matrix(given)
    assert found.shape == (len(r), kind.width)
    apart = (by_scipy(name, found).inv() * Rotation.from_matrix(r)).magnitude()
    assert apart.max() < (3e-7 if rounded else 3e-15)
    if name.startswith("quaternion"):
        assert (found[:, 3 if name.endswith("w") else 0] >= 0).all()
    if name == "axis_angle":
        assert np.linalg.norm(found, axis=1).max() <= np.pi + 1e-12


def test_rows_without_a_direction_are_not_finite() -> None:
    rows = np.array([[0, 0, 0, 1, 0, 0], [1, 0, 0, 2, 0, 0]], np.float64)
    assert np.isnan(ROTATIONS["rot6d"].to_matrix(rows)).any(axis=(1, 2)).all()
    assert np.isnan(ROTATIONS["quaternion_xyzw"].to_matrix(np.zeros((1, 4)))).all()
