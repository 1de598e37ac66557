"""Action transforms and images of `uwm_torch.py` against those that training applies."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.data import images, rotations
from uwm_jax.data.robot import RobotActions
from uwm_jax.data.transforms import PRESETS

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.torch_bridge import uwm_torch  # noqa: E402

WIDTHS = {name: rotation.width for name, rotation in rotations.ROTATIONS.items()}
TRANSFORMS = {
    "identity": 3,
    "gripper_inverted": 2,
    "gripper_scaled:-1:1": 1,
    "gripper_scaled:0.08:0": 2,
    **{f"{name}_to_rot6d": width for name, width in WIDTHS.items() if name != "rot6d"},
    **{f"xyz_{name}_to_rot6d": 3 + width for name, width in WIDTHS.items() if name != "rot6d"},
    "relative:pose[1:7]": 6,
    "relative:pose[-6:]:rpy": 6,
    "relative:pose[:7]:rot6d:quaternion_wxyz": 9,
    **{f"relative:pose[:7]:{name}:quaternion_xyzw": 3 + width for name, width in WIDTHS.items()},
    "relative:pose[:4]:position": 4,
    "relative:pose:position:position": 8,
}


def robots(*parts: tuple[str, int]) -> tuple[RobotActions, uwm_torch.RobotActions]:
    """A robot of these transforms, ours and the file's."""
    states = {"pose": 8} if any("relative" in name for name, _ in parts) else {}
    stored = {
        "parts": [
            {"columns": f"action{i}", "transform": name, "width": width} for i, (name, width) in enumerate(parts)
        ],
        "states": states,
    }
    ours = RobotActions.from_json(stored)
    described = {"robots": {"arm": ours.to_json()}, "shapes": {"action": [4, ours.model_width]}}
    return ours, uwm_torch.RobotActions.of_description(described, "")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_and_inverses(name):
    ours, theirs = robots((name, TRANSFORMS[name]))
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(5, 4, ours.width)).astype(np.float32)
    states = {"pose": rng.normal(size=(5, 8)).astype(np.float32)}
    held = {"pose": torch.from_numpy(states["pose"])}
    wanted = ours.to_model(actions, states)
    found = theirs.to_model(torch.from_numpy(actions), held).numpy()
    assert found.dtype == np.float32 and theirs.width == ours.width
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    made = rng.normal(size=wanted.shape).astype(np.float32)  # rows that are not orthonormal
    np.testing.assert_allclose(
        theirs.to_robot(torch.from_numpy(made), held).numpy(), ours.to_robot(made, states), rtol=1e-6, atol=1e-6
    )
    back = theirs.to_model(theirs.to_robot(torch.from_numpy(wanted), held), held)
    np.testing.assert_allclose(back, wanted, atol=2e-6)


@pytest.mark.parametrize("name", WIDTHS)
def test_rotations_at_their_singular_points(name):
    ours, theirs = rotations.ROTATIONS[name], uwm_torch.ROTATIONS[name]
    quarter = np.pi / 2
    angles = [
        (0, 0, 0),
        (0.3, quarter, 0.2),
        (0.3, -quarter, 0.2),
        (np.pi, 0, 0),
        (0, np.pi, 0),
        (0, 0, np.pi),
        (1e-9, 0, 0),
    ]
    matrices = rotations.ROTATIONS["euler"].to_matrix(np.array(angles))
    numbers = theirs.from_matrix(torch.from_numpy(matrices))
    np.testing.assert_allclose(numbers, ours.from_matrix(matrices), atol=1e-12)
    np.testing.assert_allclose(theirs.to_matrix(numbers), matrices, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_are_joined_in_order(preset):
    widths = {"bridge": (6, 1), "droid": (6, 1), "libero": (6, 1)}[preset]
    ours, theirs = robots(*((name, width) for (_, name), width in zip(PRESETS[preset], widths, strict=True)))
    actions = np.random.default_rng(1).normal(size=(2, 3, ours.width)).astype(np.float32)
    model = theirs.to_model(torch.from_numpy(actions), {}).numpy()
    np.testing.assert_allclose(model, ours.to_model(actions, {}), atol=1e-6)
    np.testing.assert_allclose(
        theirs.to_robot(torch.from_numpy(model), {}).numpy(), ours.to_robot(model, {}), atol=1e-6
    )


def test_the_source_tells_the_robot():
    one, other = ({"parts": [{"columns": "action", "transform": name, "width": 2}], "states": {}} for name in
                  ("identity", "gripper_inverted"))  # fmt: skip
    described = {"robots": {"a": one, "b": other}, "shapes": {"action": [4, 2]}}
    with pytest.raises(uwm_torch.UserError, match=r"the sources a, b .* load\(..., source=NAME\)"):
        uwm_torch.RobotActions.of_description(described, "")
    ones = torch.ones(1, 4, 2)
    for source, value in (("a", 1), ("b", 0)):
        assert (uwm_torch.RobotActions.of_description(described, source).to_robot(ones, {}) == value).all()
    alike = {**described, "robots": {"a": one, "b": one}}
    assert (uwm_torch.RobotActions.of_description(alike, "").to_robot(ones, {}) == 1).all()


SIZES = {  # raw (height, width) of two cameras, resize, crop
    "kept": ({"a": (16, 20), "b": (16, 20)}, (16, 20), (16, 20)),
    "cropped": ({"a": (17, 20), "b": (17, 20)}, (17, 20), (12, 13)),
    "shrunk and enlarged": ({"a": (45, 80), "b": (9, 11)}, (24, 26), (21, 20)),
    "one axis of one camera": ({"a": (24, 31), "b": (30, 26)}, (24, 26), (20, 26)),
}


@pytest.mark.parametrize(("cameras", "resize", "crop"), SIZES.values(), ids=SIZES)
def test_frames_become_the_same_images(cameras, resize, crop):
    rng = np.random.default_rng(2)
    frames = {name: rng.integers(0, 256, (3, 2, *size, 3), np.uint8) for name, size in cameras.items()}
    wanted, _ = images.preprocess({name: jnp.asarray(x) for name, x in frames.items()}, None, resize=resize, crop=crop)
    module = uwm_torch.Images(cameras, resize, crop)
    found = module({name: torch.from_numpy(x) for name, x in frames.items()})
    assert found.shape == (3, 2, 2, 3, *crop)
    np.testing.assert_allclose(found.movedim(-3, -1), wanted, atol=5e-7)
    assert module.state_dict() == {}  # nothing of it is in the weights
