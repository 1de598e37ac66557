"""Named transforms of actions against scipy's rotations: forwards, back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from configs import droid
from tests.data.rotation_case import apart, by_scipy, special_rotations
from uwm_jax.data.robot import Part, RobotActions
from uwm_jax.data.rotations import ROTATIONS
from uwm_jax.data.transforms import PRESETS, Columns, get_transform, parse, preset
from uwm_jax.errors import UserError

RECORDED = sorted(ROTATIONS.keys() - {"rot6d"})
ignore_gimbal = pytest.mark.filterwarnings("ignore:Gimbal lock")


def _poses(name: str, seed: int = 0) -> np.ndarray:
    """(n, 3 + width) float32 positions with all kinds of rotations, in another order for another seed."""
    rng = np.random.default_rng(seed)
    rotations = special_rotations(name)
    rotations = rng.permutation(rotations) if seed else rotations
    return np.concatenate([rng.normal(size=(len(rotations), 3)), rotations], axis=1).astype(np.float32)


@ignore_gimbal
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("position", [0, 3])
def test_rotations_become_two_rows_and_come_back(name: str, position: int) -> None:
    poses = _poses(name)[:, 3 - position :]
    transform = get_transform(f"{'xyz_' if position else ''}{name}_to_rot6d")
    assert transform.width("key", poses.shape[1]) == position + 6
    made = transform.apply(poses)
    assert made.dtype == np.float32 and made.shape == (len(poses), position + 6)
    expected = by_scipy(name, poses[:, position:].astype(np.float64))
    rows = expected.as_matrix()[:, :2].reshape(-1, 6)
    np.testing.assert_allclose(made[:, position:], rows, atol=1e-7)
    back = transform.invert(made)
    assert back.dtype == np.float32 and back.shape == poses.shape
    assert apart(by_scipy(name, back[:, position:].astype(np.float64)), expected) < 1e-6
    for array in (made, back):
        np.testing.assert_array_equal(array[:, :position], poses[:, :position])


def test_grippers() -> None:
    g = np.float32([[0.0], [0.25], [1.0]])
    inverted, scaled = get_transform("gripper_inverted"), get_transform("gripper_scaled:-1:1")
    np.testing.assert_array_equal(inverted.apply(g), [[1], [0.75], [0]])
    np.testing.assert_array_equal(scaled.apply(np.float32([[-1], [0], [1]])), [[0], [0.5], [1]])
    # Statistics are of values as they are stored: percent in bytes.
    np.testing.assert_array_equal(inverted.apply(np.uint8([[0], [1], [100]])), [[1], [0], [-99]])
    downwards = get_transform("gripper_scaled:0.08:0")  # metres between the fingers
    np.testing.assert_allclose(downwards.apply(np.float32([[0.08], [0.02]])), [[0], [0.75]], atol=1e-7)
    for transform in (inverted, scaled, downwards):
        assert transform.width("key", 1) == 1 and transform.apply(g).dtype == np.float32
        np.testing.assert_allclose(transform.invert(transform.apply(g)), g, atol=1e-7)


@ignore_gimbal
@pytest.mark.parametrize("action", sorted(ROTATIONS))
@pytest.mark.parametrize("state", ["", "rpy", "quaternion_wxyz"])
def test_poses_become_relative_to_the_present(action: str, state: str) -> None:
    """p_k - p_s and R_s^T R_k, of chunks of 2 steps with a present step each."""
    transform = get_transform(f"relative:obs[2:]:{action}" + (f":{state}" if state else ""))
    assert transform.state == Columns("obs", 2)
    poses, present = _poses(action), _poses(state or action, seed=1)
    count = min(len(poses) // 2, len(present))
    chunks, present = poses[: 2 * count].reshape(count, 2, -1), present[:count]
    transform.check_state(chunks.shape[-1], present.shape[-1])
    assert transform.width("key", chunks.shape[-1]) == 9
    made = transform.apply(chunks, present)
    assert made.shape == (count, 2, 9) and made.dtype == np.float32
    now = by_scipy(state or action, present[:, 3:].astype(np.float64)).as_matrix()
    flat = chunks.reshape(2 * count, -1).astype(np.float64)
    recorded = by_scipy(action, flat[:, 3:])
    expected = np.swapaxes(np.repeat(now, 2, axis=0), 1, 2) @ recorded.as_matrix()
    np.testing.assert_allclose(made[..., :3], chunks[..., :3] - present[:, None, :3], atol=1e-6)
    # Recorded rot6d rows are float32, so no exact rotations.
    np.testing.assert_allclose(made[..., 3:].reshape(-1, 6), expected[:, :2].reshape(-1, 6), atol=3e-7)
    back = transform.invert(made, present).reshape(2 * count, -1)
    np.testing.assert_allclose(back[:, :3], flat[:, :3], atol=1e-6)
    assert apart(by_scipy(action, back[:, 3:].astype(np.float64)), recorded) < 1e-6


def test_the_sign_of_a_quaternion_changes_nothing() -> None:
    transform = get_transform("relative:pose:quaternion_xyzw")
    poses, present = _poses("quaternion_xyzw")[:40, None], _poses("quaternion_xyzw", seed=1)[:40]
    expected = transform.apply(poses, present)
    sign = np.float32([1, 1, 1, -1, -1, -1, -1])
    for a, b in ((poses * sign, present), (poses, present * sign), (poses * sign, present * sign)):
        np.testing.assert_allclose(transform.apply(a, b), expected, atol=1e-6)


def test_positions_and_joints_become_relative() -> None:
    transform = get_transform("relative:joint_position:position")
    rng = np.random.default_rng(0)
    joints, now = rng.normal(size=(5, 4, 7)).astype(np.float32), rng.normal(size=(5, 7)).astype(np.float32)
    transform.check_state(7, 7)
    assert transform.width("key", 7) == 7
    made = transform.apply(joints, now)
    np.testing.assert_allclose(made, joints - now[:, None], atol=1e-6)
    np.testing.assert_allclose(transform.invert(made, now), joints, atol=1e-6)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_make_one_convention_and_give_back_their_own(name: str) -> None:
    """Position, two rows of the rotation, and a gripper that is 0 open and 1 closed."""
    pairs = parse(preset(name))
    assert [str(columns) for columns, _ in pairs] == {
        "bridge": ["action[:6]", "action[6:]"],
        "droid": ["action_dict/cartesian_velocity", "action_dict/gripper_position"],
        "libero": ["action[:6]", "action[6:]"],
    }[name]
    robot = RobotActions(tuple(Part(*pair, dim) for pair, dim in zip(pairs, (6, 1), strict=True)))
    opened, closed = {"bridge": (1, 0), "droid": (0, 1), "libero": (-1, 1)}[name]
    kind = {"bridge": "rpy", "droid": "euler", "libero": "axis_angle"}[name]
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (30, 16, 7)).astype(np.float32)
    actions[::2, :, 6], actions[1::2, :, 6] = opened, closed
    made = robot.to_model(actions, {})
    assert (robot.width, robot.model_width) == (7, 10) and made.shape == (30, 16, 10) and made.dtype == np.float32
    np.testing.assert_array_equal(made[..., :3], actions[..., :3])
    assert (made[::2, :, 9] == 0).all() and (made[1::2, :, 9] == 1).all()
    rotations = by_scipy(kind, actions[..., 3:6].reshape(-1, 3).astype(np.float64))
    np.testing.assert_allclose(made[..., 3:9].reshape(-1, 6), rotations.as_matrix()[:, :2].reshape(-1, 6), atol=1e-7)
    np.testing.assert_allclose(robot.to_robot(made, {}), actions, atol=1e-6)  # commands below a right angle: unique
    off = made + rng.normal(0, 0.05, made.shape).astype(np.float32)  # as a model makes them, no exact rotations
    assert np.isfinite(robot.to_robot(off, {})).all()


def test_the_preset_of_droid_is_the_papers_action() -> None:
    assert droid.get_config().data.action == (
        ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"),
        ("action_dict/gripper_position", "identity"),
    )
    with pytest.raises(UserError, match="no preset 'aloha' of config.data.action; there are bridge, droid, libero"):
        preset("aloha")


def test_columns() -> None:
    values = np.arange(14).reshape(2, 7)
    for text, expected in (("a/b", values), ("a/b[:6]", values[:, :6]), ("a/b[6:]", values[:, 6:])):
        columns = Columns.parse(text)
        assert str(columns) == text and columns.key == "a/b" and columns.width(7) == expected.shape[1]
        np.testing.assert_array_equal(columns.of(values), expected)
    assert Columns.parse("a[-1:]").width(7) == 1 and Columns.parse("a[:-1]").width(7) == 6
    for text in ("a[:8]", "a[7:]", "a[5:2]"):
        with pytest.raises(UserError, match=r"takes columns that 'a', of 7 numbers, does not have"):
            Columns.parse(text).width(7)


@pytest.mark.parametrize("text", ["", "a[6]", "a[:6", "a[x:]", "a[-:]", "[:3]", "a[1:2:3]"])
def test_columns_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="config.data.sources.b.action: expected a step key, or columns of it"):
        parse(((text, "identity"),), "config.data.sources.b.action")


def test_widths_that_do_not_fit_are_named() -> None:
    assert get_transform("identity").width("anything", 7) == 7
    with pytest.raises(UserError, match="'xyz_euler_to_rot6d' takes 6 numbers, but 'velocity' has 7"):
        get_transform("xyz_euler_to_rot6d").width("velocity", 7)
    with pytest.raises(UserError, match="'relative:state:quaternion_xyzw' takes 7 numbers, but 'action' has 6"):
        get_transform("relative:state:quaternion_xyzw").width("action", 6)
    with pytest.raises(UserError, match=r"'relative:state' needs a state of 6 numbers, but 'state' has 7"):
        get_transform("relative:state").check_state(6, 7)
    with pytest.raises(UserError, match="needs a state of 2 numbers, but 'p' has 3"):
        get_transform("relative:p:position").check_state(2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rot6", "no transform 'rot6'; there are identity, gripper_inverted, .*xyz_euler_to_rot6d.*relative:<key>"),
        ("xyz_euler_to_rot6", "Did you mean xyz_euler_to_rot6d"),
        ("rot6d_to_rot6d", "no transform"),
        ("gripper_inverted:1", "no transform"),
        ("gripper_scaled", "expected 'gripper_scaled:LOW:HIGH' with two different numbers"),
        ("gripper_scaled:1", "found 'gripper_scaled:1'"),
        ("gripper_scaled:1:1", "two different numbers"),
        ("gripper_scaled:0:inf", "two different numbers"),
        ("gripper_scaled:0:nan", "two different numbers"),
        ("gripper_scaled:0:x", "two different numbers"),
        ("relative", "expected 'relative:<key>' or 'relative:<key>:<rotation>'"),
        ("relative:", "expected 'relative:<key>'"),
        ("relative:state:degrees", "the rotation is euler, rpy, axis_angle, .*; found 'relative:state:degrees'"),
        ("relative:state:position:rpy", "expected 'relative:<key>'"),
        ("relative:state:rpy:position", "expected 'relative:<key>'"),
        ("relative:state:rpy:rpy:rpy", "expected 'relative:<key>'"),
        ("relative:state[6]:rpy", "expected a step key, or columns of it"),
    ],
)
def test_transforms_that_are_none(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"config.data.action: .*{message}"):
        get_transform(name)


def test_a_rotation_that_is_none_is_not_finite() -> None:
    assert np.isnan(get_transform("quaternion_xyzw_to_rot6d").apply(np.zeros((1, 4)))).all()
    assert np.isnan(get_transform("xyz_rpy_to_rot6d").invert(np.zeros((1, 9))))[:, 3:].all()


def test_a_frame_that_turns_with_the_robot_turns_no_position() -> None:
    """By hand: a quarter turn about z now, half a turn later; positions differ in the fixed frame."""
    now, later = [1, 0, 0, 0, 0, np.pi / 2], [1, 2, 0, 0, 0, np.pi]
    made = get_transform("relative:pose:rpy").apply(np.float32([later]), np.float32(now))
    np.testing.assert_allclose(made, [[0, 2, 0, 0, -1, 0, 1, 0, 0]], atol=1e-6)
    assert apart(Rotation.from_euler("z", np.pi / 2), by_scipy("rot6d", made[:, 3:])) < 1e-6
