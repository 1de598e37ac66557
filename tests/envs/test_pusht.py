"""The PushT environment: episodes that a seed determines, and their ends."""

from __future__ import annotations

import numpy as np
import pytest

from uwm_jax import envs
from uwm_jax.errors import UserError

pytest.importorskip("gym_pusht")

from uwm_jax.envs.pusht import MAX_STEPS, PushT  # noqa: E402
from uwm_jax.envs.pusht_simulator import GOAL_POSE, read_state  # noqa: E402


def test_episodes_are_those_of_the_demonstrations():
    """The same seed gives the pictures, positions and coverage that `data_prep.demo` stores."""
    demo = pytest.importorskip("data_prep.demo")
    env, expert = envs.get("pusht").make({"image": (32, 32)}), envs.get("pusht").expert()
    for number in range(2):
        stored = demo.run_episode(number, demo.Demo(image_size=32, max_steps=12))
        observation, info = env.reset(seed=number)
        expert.reset(number)
        for t in range(13):
            assert demo._png(observation["image"]) == stored.images[t]
            np.testing.assert_array_equal(observation["agent_pos"], stored.agent_pos[t])
            assert observation["agent_pos"].dtype == np.float32 and observation["image"].dtype == np.uint8
            if t < 12:
                observation, reward, terminated, truncated, info = env.step(expert.act(env))
                assert np.float32(reward) == stored.reward[t] and not terminated and not truncated
        assert info == {"score": stored.coverage, "success": False}


def test_a_seed_determines_an_episode_whatever_was_before():
    def run(env: PushT) -> tuple[list[float], np.ndarray]:
        rng = np.random.default_rng(0)
        observation, info = env.reset(seed=100_000)
        scores = [info["score"]]
        for _ in range(20):
            observation, *_, info = env.step(rng.uniform(100, 400, 2))
            scores.append(info["score"])
        return scores, observation["image"]

    used = PushT({"image": (64, 64)})
    scores, image = run(used)
    for env in (used, PushT({"image": (64, 64)})):
        again, same = run(env)
        assert again == scores
        np.testing.assert_array_equal(same, image)
    assert set(PushT({}).reset(seed=0)[0]) == {"agent_pos"}  # no camera, no picture


def test_the_ends_of_an_episode():
    env = PushT({})
    env.reset(seed=3)
    still = read_state(env.simulator)[:2]
    ends = [env.step(still)[2:4] for _ in range(MAX_STEPS)]
    assert ends == [(False, False)] * (MAX_STEPS - 1) + [(False, True)]

    env.reset(seed=3)
    env.simulator.block.angle = GOAL_POSE[2]
    env.simulator.block.position = GOAL_POSE[:2]
    _, reward, terminated, truncated, info = env.step(still)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True) and info["score"] > 0.95


def test_targets_beyond_the_board_are_those_on_its_edge():
    places = []
    for target in ([600.0, -50.0], [512.0, 0.0]):
        env = PushT({})
        env.reset(seed=1)
        for _ in range(10):
            observation = env.step(np.array(target))[0]
        places.append(observation["agent_pos"])
    np.testing.assert_array_equal(*places)


def test_errors_of_the_registry(monkeypatch):
    with pytest.raises(UserError, match="--env=pushit: .* Known: pusht"):
        envs.get("pushit")
    with pytest.raises(UserError, match="square frames of the camera 'image'"):
        PushT({"image": (64, 96)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"uwm_jax\[demo\]"):
        envs.get("pusht")
