"""The simulator of PushT: coverage, and pictures with and without OpenCV."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from uwm_jax.envs.pusht_simulator import GOAL_POSE, Renderer, make_env, read_state, resize  # noqa: E402


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
        from uwm_jax.envs.pusht_simulator import Renderer, make_env
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
