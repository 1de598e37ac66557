"""Actions of a robot through a run's data: windows, statistics and a mixture's robots, against episodes by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.spatial.transform import Rotation

from tests.data import rlds_source
from uwm_jax.config import base, source
from uwm_jax.data import stats
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.robot import parse_limits
from uwm_jax.data.run_data import RunData
from uwm_jax.data.samples import Clip
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError

LENGTHS = [21, 9, 30, 19, 12, 25]  # of `tiny_dataset`
POSE = "action_dict/cartesian_velocity"  # stands for the pose of a state, as it is random
RELATIVE = (("action[:6]", f"relative:{POSE}:rpy:euler"), ("action[6:]", "gripper_inverted"))


@pytest.fixture(scope="module")
def made(tiny_dataset: Path) -> tuple[Path, list[dict[str, Any]]]:
    return tiny_dataset, rlds_source.make_episodes(LENGTHS)


@pytest.fixture
def config(made) -> ConfigDict:
    c = base().data
    c.path, c.cameras, c.low_dim = str(made[0]), ("wrist",), ()
    c.window.obs, c.window.action, c.window.next_obs = (0, 2), (2, 3, 4), (5,)
    c.val_ratio, c.num_streams, c.num_threads = 0.25, 1, 0
    c.action = RELATIVE
    return c


def by_hand(episode: dict[str, Any], present: int, steps: list[int]) -> np.ndarray:
    """(steps, 10) the actions of `RELATIVE` at these steps, seen from the present one."""
    rows = []
    pose = episode["steps"][present]["action_dict"]["cartesian_velocity"]
    for step in steps:
        action = episode["steps"][step]["action"]
        turned = Rotation.from_euler("XYZ", pose[3:]).inv() * Rotation.from_euler("xyz", action[3:6])
        rows.append([*(action[:3] - pose[:3]), *turned.as_matrix()[:2].reshape(-1), 1 - action[6]])
    return np.array(rows)


def windows_by_hand(episodes: list[dict[str, Any]], config: ConfigDict) -> dict[tuple[int, int], np.ndarray]:
    """{(episode, origin): (Ta, 10)} of all windows of all episodes."""
    found = {}
    for number, episode in enumerate(episodes):
        last = len(episode["steps"]) - 1
        span = range(-2, last - 1) if config.window.pad == "edge" else range(last - 4)
        for origin in span:
            inside = [min(max(origin + i, 0), last) for i in config.window.action]
            found[number, origin] = by_hand(episode, min(max(origin + 2, 0), last), inside)
    return found


@pytest.mark.parametrize("pad", ["none", "edge"])
def test_the_normaliser_is_fitted_on_what_training_sees(made, config: ConfigDict, pad: str) -> None:
    """Statistics of relative actions are those of all windows of training episodes, with their padding."""
    config.window.pad = pad
    data = RunData(config, seed=3)
    train, held_out = split_episodes(len(LENGTHS), config.val_ratio)
    expected = windows_by_hand(made[1], config)
    (robot,) = data.sources.values()
    assert len(robot.windows) == sum(episode in train for episode, _ in expected)
    seen = np.concatenate([actions for (episode, _), actions in expected.items() if episode in train])
    found_stats = robot.stats()["action"]
    np.testing.assert_allclose(found_stats["min"][:9], seen.min(axis=0)[:9], atol=1e-6)
    np.testing.assert_allclose(found_stats["max"][:9], seen.max(axis=0)[:9], atol=1e-6)
    np.testing.assert_allclose(found_stats["mean"][:9], seen.mean(axis=0)[:9], atol=1e-6)
    np.testing.assert_allclose(found_stats["std"][:9], seen.std(axis=0)[:9], atol=1e-6)
    np.testing.assert_allclose(found_stats["q99"][:9], np.quantile(seen, 0.99, axis=0)[:9], atol=1e-6)
    assert found_stats["count"] == len(seen) and found_stats["nonfinite"] == 0

    normalizer = data.spec.normalizer
    batches = [robot.samples.action(Clip(*key), config.window.action, normalizer) for key in expected]
    for (key, actions), found in zip(expected.items(), batches, strict=True):
        raw = normalizer.unnormalize("action", found)
        np.testing.assert_allclose(raw, actions, atol=2e-6, err_msg=str(key))
    trained = np.concatenate([x for (e, _), x in zip(expected, batches, strict=True) if e in train])
    np.testing.assert_allclose(np.abs(trained).max(axis=0)[:9], 1, atol=1e-5)

    batch = next(iter(Loader(data, batch_size=4)))
    assert batch["action"].shape == (4, 3, 10) and set(batch) >= {"obs/wrist"} and f"obs/{POSE}" not in batch


def test_statistics_are_kept_by_transform_and_window(made, config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    original = stats.stats_of
    monkeypatch.setattr(stats, "stats_of", lambda *args: computed.append("") or original(*args))
    folder = made[0] / "derived_stats"
    before = set(folder.glob("*"))

    def opened() -> dict[str, Any]:
        computed.clear()
        return RunData(config, seed=0).spec.normalizer.to_json()

    config.window.action, config.val_ratio = (2, 3), 0.45  # no other test has these
    first = opened()
    assert len(computed) == 2 and opened() == first and not computed
    (file,) = (f for f in set(folder.glob("*")) - before if "relative" in f.name)
    stored = json.loads(file.read_text())
    assert stored["transform"] == RELATIVE[0][1] and stored["columns"] == "action[:6]"
    assert file.name.startswith("train.action__6_.relative_action_dict.cartesian_velocity_rpy_euler.val_0.45.")
    config.window.action = (2, 3, 4, 5)
    assert opened() != first and len(computed) == 1  # the gripper's are those of steps
    config.action = (("action[:6]", f"relative:{POSE}:euler"), RELATIVE[1])
    assert opened() != first and len(computed) == 1


def test_only_windows_that_are_kept_count(made, config: ConfigDict) -> None:
    config.max_action = (("action[:6]", 2.0),)
    (robot,) = RunData(config, seed=0).sources.values()
    assert 0 < len(robot.windows) < robot.windows.total
    expected = windows_by_hand(made[1], config)
    kept = zip(*robot.windows.locate_all(np.arange(len(robot.windows))), strict=True)
    seen = np.concatenate([expected[int(episode), int(origin)] for episode, origin in kept])
    found = robot.stats()["action"]
    for name, values in (("min", seen.min(axis=0)), ("max", seen.max(axis=0)), ("mean", seen.mean(axis=0))):
        np.testing.assert_allclose(found[name][:9], values[:9], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ((("action", "xyz_quaternion_xyzw_to_rot6d"),), "action by xyz_quaternion_xyzw_to_rot6d: 2 episodes (1, 3)"),
        (
            ((f"{POSE}", "relative:action:rpy:quaternion_wxyz"),),
            "action by relative:action:rpy:quaternion_wxyz: 2 episodes (1, 3)",
        ),
    ],
)
def test_numbers_that_mean_no_rotation_are_named_and_can_be_left_out(
    made, config: ConfigDict, monkeypatch: pytest.MonkeyPatch, action: Any, told: str
) -> None:
    """Of episodes 1 and 3, a quaternion is zero at one step."""
    read = Dataset.column

    def column(self: Dataset, key: str, keep: bool = True) -> Any:
        values = read(self, key, keep)[:]
        if key == "action":
            values = values.copy()
            values[[LENGTHS[0] + 4, sum(LENGTHS[:3]) + 11], 3:] = 0
        return values

    monkeypatch.setattr(Dataset, "column", column)
    config.action = action
    with pytest.raises(UserError) as e:
        RunData(config, seed=0)
    assert told in str(e.value) and "--config.data.drop_nonfinite=true leaves out" in str(e.value)
    config.drop_nonfinite = True
    (arm,) = RunData(config, seed=0).sources.values()
    assert np.flatnonzero(~arm.selection.kept).tolist() == [1, 3] and arm.stats()["action"]["nonfinite"] == 0


def test_values_far_out_are_those_of_windows(made, config: ConfigDict) -> None:
    config.normalize = "none"
    data = RunData(config, seed=0)
    train = split_episodes(len(LENGTHS), config.val_ratio)[0]
    seen = np.concatenate([x for (e, _), x in windows_by_hand(made[1], config).items() if e in train])
    (line,) = (line for line in data.warnings(1.0, 0) if "beyond" in line)
    share = np.mean(np.abs(seen[:, 0]) > 1)
    assert f"column 0 ({share:.2%} of its values, up to {np.abs(seen[:, 0]).max():.4g})" in line


def test_a_state_has_the_name_of_the_low_dimensional_key(config: ConfigDict) -> None:
    """Its full width, so that one observation serves both."""
    config.low_dim, config.action = ("state",), (("action[:2]", "relative:observation/state[1:]:position"),)
    spec = RunData(config, seed=0).spec
    robot = spec.robot()
    assert robot is not None and dict(robot.states) == {"state": 3} and (robot.width, spec.action_dim) == (2, 2)
    assert spec.observation_like(1, robot).keys() == {"wrist", "state"}
    config.low_dim = ()
    assert RunData(config, seed=0).spec.robot().states == {"observation/state": 3}  # as the config calls it


def test_the_spec_keeps_the_robot(config: ConfigDict) -> None:
    spec = RunData(config, seed=0).spec
    again = DataSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.robots.keys() == spec.robots.keys() and again.to_json() == spec.to_json()
    one, other = spec.robot(), again.robot()
    assert one == other and one.is_like(other) and dict(one.states) == {POSE: 6} and one.width == 7
    rng = np.random.default_rng(0)
    actions, states = rng.normal(size=(2, 3, 10)), {POSE: rng.normal(size=(2, 6))}
    np.testing.assert_array_equal(one.to_robot(actions, states), other.to_robot(actions, states))
    old = spec.to_json()
    del old["robots"]
    assert DataSpec.from_json(old).robot() is None


def test_whose_robot_acts_has_to_be_said_where_conventions_differ(config: ConfigDict) -> None:
    config.action = (("action", "identity"),)
    same = source(action=((f"{POSE}", "identity"), ("action_dict/gripper_position", "identity")))
    config.sources = ConfigDict({"a": source(), "b": source(), "video": source(use_actions=False)})
    spec = RunData(config, seed=0).spec
    assert spec.robots.keys() == {"a", "b"} and spec.robot() is spec.robots["a"]
    inverted = source(action=(("action[:6]", "identity"), ("action[6:]", "gripper_inverted")))
    config.sources = ConfigDict({"a": source(), "b": inverted, "c": same})
    spec = RunData(config, seed=0).spec
    with pytest.raises(UserError, match=r"the sources a, b, c .* different transforms .*Policy\(\.\.\., source=NAME\)"):
        spec.robot()
    x = np.ones((1, 7), np.float32) / 4
    np.testing.assert_array_equal(spec.robot("b").to_robot(x, {})[0, 5:], [0.25, 0.75])
    np.testing.assert_array_equal(spec.robot("a").to_robot(x, {}), x)
    with pytest.raises(UserError, match="source='video': the model was trained on actions of a, b, c"):
        spec.robot("video")
    with pytest.raises(UserError, match="source='a': .* of no source that it knows"):
        dataclasses.replace(spec, robots={}).robot("a")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ((("action[:6]", "relative:nowhere"),), "no low-dimensional key 'nowhere'"),
        ((("action[:6]", "relative:state"),), "'relative:state' needs a state of 6 numbers, but 'state' has 3"),
        ((("action", f"relative:{POSE}"),), "takes 6 numbers, but 'action' has 7"),
        ((("action[3:8]", "identity"),), r"action\[3:8\] takes columns that 'action', of 7 numbers, does not have"),
    ],
)
def test_actions_that_the_data_do_not_have(config: ConfigDict, action: Any, message: str) -> None:
    config.action = action
    with pytest.raises(UserError, match=message):
        RunData(config, seed=0)


def test_limits_are_parsed_or_refused() -> None:
    low, high = parse_limits("-1:2.5,:0,3:", 3)
    assert (low.tolist(), high.tolist()) == ([-1, -np.inf, 3], [2.5, 0, np.inf])
    low, high = parse_limits("0:512", 2)
    assert (low.dtype, low.tolist(), high.tolist()) == (np.float32, [0, 0], [512, 512])
    for text in ("", "1", "1:0", "0:1,0:1", "a:b", "nan:1", "0:1:2", "0:1,,0:1", "0:1;0:1"):
        with pytest.raises(UserError, match="--action_limits=.*LOW:HIGH for all 3 columns"):
            parse_limits(text, 3, "--action_limits")
