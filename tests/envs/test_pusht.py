"""The PushT environment: coverage, pictures, episodes that a seed determines."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from uwm_jax import envs
from uwm_jax.errors import UserError

pytest.importorskip("gym_pusht")

from uwm_jax.envs.pusht import GOAL_POSE, MAX_STEPS, PushT, Renderer, make_env, read_state, resize  # noqa: E402


def test_coverage_is_the_environments():
    env = make_env()
    for seed in range(5):
        env.reset(seed=seed)
        env.block.angle = GOAL_POSE[2] + 0.02 * seed
        env.block.position = GOAL_POSE[0] + seed, GOAL_POSE[1]
        ours = env._get_coverage()
        assert ours == pytest.approx(type(env)._get_coverage(env), rel=1e-12)
        assert ours > 0.7


@pytest.mark.parametrize("size,tolerance", [(64, 0), (128, 0), (96, 1)])
def test_pictures_are_the_environments(size, tolerance):
    pytest.importorskip("cv2", exc_type=ImportError)
    env = make_env()
    env.observation_width = env.observation_height = size
    env.reset(seed=0)
    render = Renderer(env, size)
    for seed in range(8):
        env.reset(seed=seed)
        for _ in range(3):
            env.step(read_state(env)[4:6])  # into the block: contacts are drawn as well
        difference = np.abs(render().astype(int) - env._render().astype(int))
        assert difference.max() <= tolerance


def test_resize_of_a_ramp_is_exact():
    """Bilinear interpolation reproduces what is linear, and half-pixel centres fix where it is read."""
    x = np.arange(64) * 2.0
    image = np.repeat(np.repeat(x[None, :, None], 64, 0), 3, 2).astype(np.uint8)
    np.testing.assert_array_equal(resize(image, (16, 8))[:, :, 1], np.tile(x[1::4] + 1, (8, 1)))


def test_runs_where_opencv_cannot_be_loaded():
    code = """
        import sys

        class NoGL:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "cv2":
                    raise ImportError("libGL.so.1: cannot open shared object file")

        sys.meta_path.insert(0, NoGL())
        from uwm_jax.envs.pusht import Renderer, make_env
        env = make_env()
        env.reset(seed=0)
        print(int(Renderer(env, 64)().sum()), "cv2" in sys.modules)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    ).stdout.split()[-2:]
    env = make_env()
    env.reset(seed=0)
    assert out == [str(int(Renderer(env, 64)().sum())), "False"]


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
