"""The receding-horizon policy, driven by a stub model whose actions say what it was given."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from uwm_jax import codecs, systems
from uwm_jax.backend import JaxBackend
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.robot import RobotActions
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import RunError, UserError
from uwm_jax.policy import Policy
from uwm_jax.synthetic import synthetic_arrays
from uwm_jax.systems.base import Use

CHUNK = 6
SCALE = {"state": (np.array([2.0], np.float32), np.array([10.0], np.float32))}


class Stub:
    """Its normalised actions (B, Ta, 3) are (newest state, place in the chunk, noise), of `policy` mode only."""

    def __init__(self, obs=(0, 1), action=tuple(range(1, 1 + CHUNK)), text_dim=0, bad=False):
        self.config = base()
        self.config.data.window.obs, self.config.data.window.action = obs, action
        action_scale = (np.array([1.0, 1.0, 4.0], np.float32), np.array([0.0, 0.0, 100.0], np.float32))
        self.spec = DataSpec(
            WindowSpec.from_config(self.config.data.window),
            {"front": (4, 5)},
            {"state": 1},
            3,
            text_dim,
            Normalizer({**SCALE, "action": action_scale}),
        )
        self.length, self.bad, self.calls = len(action), bad, []

    acting, can_promise = "policy", False
    uses = {"policy": Use(makes=("action",))}

    def noise(self, key, rows, use):
        return {"action": jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (self.length, 1)))(rows)}

    def encode(self, frozen, batch):
        return batch

    def sample(self, params, batch, use, noise):
        assert use == "policy" and set(batch) == {"obs/front", "obs/state"} | (
            {"obs/text"} if self.spec.text_dim else set()
        )
        self.calls.append(batch["obs/front"].shape)
        newest = jnp.broadcast_to(batch["obs/state"][:, -1:], (len(batch["obs/state"]), self.length, 1))
        place = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.float32)[:, None], newest.shape)
        action = jnp.concatenate([newest, place, noise["action"]], axis=-1)
        return {"action": action / 0 if self.bad else action}


def seen(*states: float) -> dict[str, np.ndarray]:
    """An observation of rows whose state is known; the frame's values are the state's."""
    values = np.array(states)
    return {
        "front": np.broadcast_to(values[:, None, None, None], (len(values), 4, 5, 3)).astype(np.uint8),
        "state": values[:, None],
    }


def make(stub: Stub, seeds=(0,), **options) -> Policy:
    policy = Policy(JaxBackend(stub, {}, {}), **options)
    policy.reset(seeds)
    return policy


@pytest.mark.parametrize(
    "obs,expected",
    [
        ((0, 1), [[5, 5], [5, 6], [6, 7], [7, 8]]),
        ((-2, 0), [[5, 5], [5, 6], [5, 7], [6, 8]]),  # spaced
        ((3,), [[5], [6], [7], [8]]),
    ],
)
def test_history_is_the_windows_and_starts_with_the_first_frame(obs, expected):
    stub = Stub(obs=obs, action=tuple(range(max(obs), max(obs) + CHUNK)))
    policy = make(stub, execute=1)
    for time, frames in enumerate(expected):
        policy.observe(seen(5 + time))
        batch = policy.inputs()
        assert batch["obs/front"].dtype == np.uint8 and batch["obs/state"].dtype == np.float32
        np.testing.assert_array_equal(batch["obs/front"][0, :, 0, 0, 0], frames)
        np.testing.assert_array_equal(batch["obs/state"][0, :, 0], frames)
    policy.reset((0,))
    policy.observe(seen(3))
    assert (policy.inputs()["obs/front"] == 3).all()  # nothing is left of the episode before


def test_the_newest_frame_may_stand_for_the_whole_history():
    stub = Stub(obs=(-2, 0), action=tuple(range(CHUNK)))
    policy = make(stub, execute=1, history="repeated")
    for time in (5, 6):
        policy.observe(seen(time))
        np.testing.assert_array_equal(policy.inputs()["obs/front"][0, :, 0, 0, 0], [time, time])
        np.testing.assert_array_equal(policy.inputs()["obs/state"][0, :, 0], [time, time])
    with pytest.raises(UserError, match="history=newest: expected kept or repeated"):
        make(stub, execute=1, history="newest")


def test_a_chunk_is_executed_in_part_and_then_planned_again():
    policy = make(Stub(), execute=4)
    actions = np.array([policy.act(seen(step))[0] for step in range(10)])
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions[:, 1], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    # Each chunk saw the observation of the step at which it begins; actions are in raw units.
    np.testing.assert_array_equal(actions[:, 0] * 2 + 10, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8])
    assert 90 < actions[:, 2].mean() < 110 and actions[:, 2].std() > 1


@pytest.mark.parametrize(
    "obs,action,first",
    [((0, 1), (1, 2, 3, 4), 0), ((0, 1), (0, 1, 2, 3, 4), 1), ((0,), (0, 1, 2, 3), 0), ((1, 4), (2, 3, 4, 5, 6, 7), 2)],
)
def test_the_first_action_is_the_newest_frames(obs, action, first):
    policy = make(Stub(obs=obs, action=action), execute=3)
    assert [policy.act(seen(1.0))[0, 1] for _ in range(4)] == [first, first + 1, first + 2, first]


@pytest.mark.parametrize(
    "obs,action,execute,message",
    [
        ((0, 1), (1, 2, 3, 4), 5, "expected 1 to 4"),
        ((0, 1), (1, 2, 3, 4), 0, "expected 1 to 4"),
        ((0, 1), (0, 1, 2, 3), 4, "expected 1 to 3"),
        ((0, 1), (1, 3, 5, 7), 2, "expected 1 to 1"),  # steps are left out
        ((0, 1), (2, 3, 4, 5), 1, "no number will do"),  # none for the present
    ],
)
def test_chunks_that_cannot_be_executed(obs, action, execute, message):
    with pytest.raises(UserError, match=message):
        make(Stub(obs=obs, action=action), execute=execute)


def test_noise_follows_from_seeds_and_decision():
    def noise(seeds, steps=4, **options):
        policy = make(Stub(), seeds, execute=2, **options)
        return np.array([policy.act(seen(*range(len(seeds))))[:, 2] for _ in range(steps)])

    first = noise([7, 8])
    assert len(np.unique(first)) == 8  # of rows, decisions and places in the chunk
    np.testing.assert_array_equal(noise([7, 8]), first)
    np.testing.assert_array_equal(noise([8, 9, 7])[:, [2, 0]], first)
    assert not np.isin(noise([7, 8], seed=1), first).any()
    policy = make(Stub(), [3], execute=2)
    again = [policy.act(seen(0))[0, 2] for _ in range(3)]
    policy.reset([7])
    np.testing.assert_array_equal([policy.act(seen(0))[0, 2] for _ in range(4)], first[:, 0])
    assert again[0] != first[0, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_do_not_depend_on_each_other(batch_size):
    """Any rows at any step, in calls of one fixed shape."""
    stub = Stub()
    together = make(stub, [10, 11, 12], execute=2, batch_size=batch_size)
    alone = [make(Stub(), [seed], execute=2) for seed in (10, 11, 12)]
    for step, rows in enumerate([[0, 1, 2], [0, 1, 2], [2, 0], [1], [1, 2, 0], [2], [0, 2]]):
        states = [10 * step + row for row in rows]
        expected = np.concatenate([alone[row].act(seen(state)) for row, state in zip(rows, states, strict=True)])
        np.testing.assert_array_equal(together.act(seen(*states), rows), expected)
    assert stub.calls == [(batch_size, 2, 4, 5, 3)]  # traced once


def test_observations_that_do_not_fit():
    policy = make(Stub(), [0, 1], execute=1)
    good = seen(1, 2)
    for change, message in (
        ({"front": None}, r"missing front: expected uint8 \(2, 4, 5, 3\)\n(.|\n)*It has state"),
        ({"front": good["front"][:1]}, r"front: expected uint8 \(2, 4, 5, 3\), found uint8 \(1, 4, 5, 3\)"),
        ({"front": good["front"].astype(np.float32)}, "front: expected uint8 .* found float32"),
        ({"state": np.zeros((2, 3))}, r"state: expected float32 \(2, 1\), found float64 \(2, 3\)"),
        ({"state": np.array([["a"], ["b"]])}, "state: expected float32"),
        ({"state": np.array([[0.0], [np.nan]])}, "state: holds values that are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            policy.act({k: v for k, v in {**good, **change}.items() if v is not None})
    assert policy.act({**good, "other": 3}).shape == (2, 3)  # a key that it does not read
    with pytest.raises(RunError, match="actions are not finite"):
        make(Stub(bad=True), execute=1).act(seen(1))


def robot(*parts: tuple[str, str, int], **states: int) -> dict[str, RobotActions]:
    named = [{"columns": columns, "transform": name, "width": width} for columns, name, width in parts]
    return {"arm": RobotActions.from_json({"parts": named, "states": states})}


def test_actions_come_back_in_the_robots_own_convention():
    """What the stub makes is (newest state, place in the chunk, noise)."""
    stub = Stub()
    stub.spec = dataclasses.replace(
        stub.spec, robots=robot(("action[:1]", "gripper_inverted", 1), ("action[1:]", "gripper_scaled:10:20", 2))
    )
    plain, policy = make(Stub(), [3, 4], execute=3), make(stub, [3, 4], execute=3)
    for step in range(5):
        made, taken = plain.act(seen(step, step + 7)), policy.act(seen(step, step + 7))
        expected = np.stack([1 - made[:, 0], 10 + 10 * made[:, 1], 10 + 10 * made[:, 2]], axis=1)
        assert taken.dtype == np.float32
        np.testing.assert_allclose(taken, expected, rtol=1e-6)


def test_relative_actions_refer_to_the_state_in_which_the_chunk_began():
    stub, pose = Stub(), {"pose": np.array([[1.0, 2, 3, 0, 0, np.pi / 2, 9], [0, 0, 0, np.pi, 0, 0, 9]])}
    half, zeros = np.full(9, 0.5, np.float32), np.zeros(9, np.float32)
    normalizer = Normalizer({**SCALE, "action": (half, zeros)})
    robots = robot(("action", "relative:pose[:6]:rpy", 6), pose=7)
    stub.spec = dataclasses.replace(stub.spec, action_dim=9, normalizer=normalizer, robots=robots)
    # A move along x, and a turn about the gripper's own z axis that grows with the place in the chunk.
    angles = np.arange(CHUNK) / 4
    rows = Rotation.from_euler("z", angles[:, None]).as_matrix()[:, :2].reshape(-1, 6)
    moves = np.stack([angles, 0 * angles, 0 * angles], axis=1)
    chunk = jnp.asarray(np.concatenate([moves, rows], axis=1) / half, jnp.float32)
    stub.sample = lambda params, batch, use, noise: {
        "action": jnp.broadcast_to(chunk, (len(batch["obs/state"]), *chunk.shape))
    }
    policy = make(stub, [0, 1], execute=2)
    with pytest.raises(UserError, match=r"missing pose: expected float32 \(2, 7\), which the robot's actions are"):
        policy.act(seen(1, 2))
    for step in range(4):
        # The second action of a chunk was planned with the first.
        taken = policy.act({**seen(1, 2), "pose": pose["pose"] + 100 * (step % 2)})
        assert taken.shape == (2, 6)
        turn = angles[step % 2]
        np.testing.assert_allclose(taken[:, :3], pose["pose"][:, :3] + [turn, 0, 0], atol=1e-6)
        expected = Rotation.from_euler("xyz", pose["pose"][:, 3:6]) * Rotation.from_euler("z", turn)
        assert (Rotation.from_euler("xyz", taken[:, 3:]).inv() * expected).magnitude().max() < 1e-6
    nothing = Normalizer({**SCALE, "action": (zeros, zeros)})  # rows without a direction are no rotation
    stub.spec = dataclasses.replace(stub.spec, normalizer=nothing)
    with pytest.raises(RunError, match="actions are not finite"):
        make(stub, [0, 1], execute=2).act({**seen(1, 2), **pose})


def test_whose_robot_acts_is_said_where_conventions_differ():
    stub = Stub()
    inverted, plain = robot(("action", "gripper_inverted", 3))["arm"], robot(("action", "identity", 3))["arm"]
    stub.spec = dataclasses.replace(stub.spec, robots={"a": inverted, "b": plain})
    with pytest.raises(UserError, match=r"Policy\(\.\.\., source=NAME\)"):
        make(stub, execute=1)
    (a, b) = (make(stub, execute=1, source=name).act(seen(5)) for name in "ab")
    np.testing.assert_array_equal(a, 1 - b)
    np.testing.assert_array_equal(b, make(Stub(), execute=1).act(seen(5)))


@pytest.mark.slow
def test_a_models_relative_actions_are_the_robots_at_the_present_pose(tiny_config):
    """End to end: data, a real model, and its spec as a checkpoint keeps it, against scipy's rotations."""
    pose = "action_dict/cartesian_velocity"  # stands for a pose that is observed, which the model does not read
    tiny_config.model.codec.name = "pixels"
    tiny_config.data.action = (("action[:6]", f"relative:{pose}:rpy:euler"), ("action[6:]", "gripper_inverted"))
    data = RunData(tiny_config.data, seed=0)
    spec = DataSpec.from_json(json.loads(json.dumps(data.spec.to_json())))
    codec = codecs.from_config(tiny_config)
    system, frozen = systems.make(tiny_config, spec, codec), synthetic_arrays(tiny_config, codec)
    params = jax.jit(system.init)(jax.random.key(0))
    policy = Policy(JaxBackend(system, params, frozen), execute=4)
    rng = np.random.default_rng(0)
    now = np.array([[0.1, 0.2, 0.3, np.pi, np.pi / 2, -1.0]], np.float32)
    seen = {"wrist": rng.integers(0, 256, (1, 16, 16, 3), np.uint8), "state": np.ones((1, 3)), pose: now}
    policy.observe(seen)
    own = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    noise = system.noise(own, jnp.zeros(1, jnp.int32), "policy")
    batch = spec.normalized({key: x for key, x in policy.inputs().items() if key != f"obs/{pose}"})
    made = np.asarray(system.sample(params, system.encode(frozen, batch), "policy", noise)["action"])
    raw = spec.normalizer.unnormalize("action", made[0]).astype(np.float64)
    taken = policy.actor.chunks(policy.inputs(), noise)[0]
    assert raw.shape == (4, 10) and taken.shape == (4, 7)
    np.testing.assert_allclose(taken[:, :3], raw[:, :3] + now[0, :3], atol=1e-6)
    np.testing.assert_allclose(taken[:, 6], 1 - raw[:, 9], atol=1e-6)
    first = raw[:, 3:6] / np.linalg.norm(raw[:, 3:6], axis=1, keepdims=True)
    third = np.cross(first, raw[:, 6:9])
    third /= np.linalg.norm(third, axis=1, keepdims=True)
    relative = Rotation.from_matrix(np.stack([first, np.cross(third, first), third], axis=1))
    expected = Rotation.from_euler("XYZ", now[:, 3:].astype(np.float64)) * relative
    assert (Rotation.from_euler("xyz", taken[:, 3:6].astype(np.float64)).inv() * expected).magnitude().max() < 1e-6


def test_text_is_read_where_the_model_reads_it():
    policy = make(Stub(text_dim=2), execute=1)
    with pytest.raises(UserError, match="missing text"):
        policy.act(seen(1))
    policy.act({**seen(1), "text": np.array([[1.0, 2.0]])})
    np.testing.assert_array_equal(policy.inputs()["obs/text"], [[1.0, 2.0]])
