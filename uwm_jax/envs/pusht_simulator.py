"""The simulator of PushT, in which a disc pushes a T-shaped block onto its goal: gym-pusht's, and its pictures.

Units: positions in pixels of a 512 x 512 board, y downwards, angles in radians, one step = 0.1 s = 10 physics steps. An
action is the absolute position (x, y) in [0, 512] that the agent is pulled towards. The score is the coverage: the
share of the goal that the block covers, [0, 1].
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from typing import Any

import numpy as np

from uwm_jax.errors import UserError

BOARD = 512.0
AGENT_RADIUS = 15.0
GOAL_POSE = (256.0, 256.0, np.pi / 4)  # x, y, angle of the block when it covers the goal
SUBSTEPS = 10
DT = 0.01
STIFFNESS, DAMPING = 100.0, 20.0  # of the environment's position controller


def make_env() -> Any:
    """The stock `PushTEnv` with `state` observations; pictures are made by `Renderer` when wanted.

    Its coverage (in `step`: reward, success, info) is summed over the block's two boxes in a fixed
    order. The stock sum follows the order of a set of objects, and so of their addresses: its last
    bits, and with them whether 95 % is reached, would change from process to process.
    """
    envs = load_gym_pusht()
    env = envs.PushTEnv(obs_type="state")
    outline = envs.pusht.pymunk_to_shapely
    env.reset(seed=0)  # makes the bodies
    goal = outline(env.get_goal_pose_body(env.goal_pose), env._block_shapes)  # the same in every episode

    def coverage() -> float:
        return goal.intersection(outline(env.block, env._block_shapes)).area / goal.area

    env._get_coverage = coverage
    return env


def load_gym_pusht() -> types.ModuleType:
    """gym_pusht.envs, also where OpenCV cannot be loaded.

    gym_pusht imports cv2 to resize pictures (and to mark the action in `render()`, which we do not
    call). The wheel it asks for links libGL and X11, which slim images lack; there the import would
    fail, and the headless wheel cannot replace it by a dependency (both own the folder `cv2`). So
    where cv2 does not load, gym_pusht is given a module with our `resize`, which our own pictures use
    everywhere, so that they are the same bits on every machine.
    """
    if importlib.util.find_spec("gym_pusht") is None:
        raise UserError("gym-pusht is not installed: run `pip install 'uwm_jax[demo]'` (or `-e '.[demo]'` in a clone).")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import cv2  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("cv2")
        stand_in.resize = resize  # type: ignore[attr-defined]
        sys.modules["cv2"] = stand_in
        try:
            import gym_pusht.envs as envs
        finally:
            del sys.modules["cv2"]  # not for other imports
        return envs
    import gym_pusht.envs as envs

    return envs


class Renderer:
    """Draws an environment as its pixel observation shows it, but draws the goal only once."""

    def __init__(self, env: Any, size: int):
        load_gym_pusht()
        import pygame
        from gym_pusht.envs.pymunk_override import DrawOptions

        self._env, self._size, self._pygame = env, size, pygame
        self._background = pygame.Surface((512, 512))
        self._background.fill((255, 255, 255))
        goal = env.get_goal_pose_body(np.array(GOAL_POSE))
        for shape in env.block.shapes:
            points = [goal.local_to_world(v) for v in shape.get_vertices()]
            points = [(round(x), round(y)) for x, y in [*points, points[0]]]
            pygame.draw.polygon(self._background, pygame.Color("LightGreen"), points)
        self._screen = self._background.copy()
        self._options = DrawOptions(self._screen)

    def __call__(self) -> np.ndarray:
        """The board now: uint8 (size, size, 3) RGB."""
        self._screen.blit(self._background, (0, 0))
        self._env.space.debug_draw(self._options)
        return resize(self._pygame.surfarray.pixels3d(self._screen).swapaxes(0, 1), (self._size, self._size))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres and no smoothing, as OpenCV's default; size is (width, height).

    uint8 (H, W, C) -> uint8 (height, width, C). Equal to OpenCV bit for bit where the scale is an even
    integer, else to one grey level.
    """
    x0, x1, fx = _taps(image.shape[1], size[0])
    y0, y1, fy = _taps(image.shape[0], size[1])
    fx, fy = fx[None, :, None], fy[:, None, None]
    low, high = image[y0], image[y1]
    top = low[:, x0] * (1 - fx) + low[:, x1] * fx
    bottom = high[:, x0] * (1 - fx) + high[:, x1] * fx
    return (top * (1 - fy) + bottom * fy + np.float32(0.5)).astype(np.uint8)


@functools.cache
def _taps(n_in: int, n_out: int) -> tuple[Any, Any, np.ndarray]:
    """Indices of the two neighbours of every output pixel along one axis, and the weight of the second."""
    x = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    low = np.minimum(x.astype(int), max(n_in - 2, 0))
    weight = (x - low).astype(np.float32)
    if n_in % (2 * n_out) == 0:  # slices instead of indices: faster, and the usual case
        step = n_in // n_out
        return slice(low[0], None, step), slice(low[0] + 1, None, step), weight
    return low, np.minimum(low + 1, n_in - 1), weight


def read_state(env: Any) -> np.ndarray:
    """The full state of the environment's bodies: float64 (10,).

    Agent x, y and velocity x, y; block x, y, angle, velocity x, y and angular velocity.
    """
    return read_bodies(env.agent, env.block)


def read_bodies(agent: Any, block: Any) -> np.ndarray:
    return np.array(
        [*agent.position, *agent.velocity, *block.position, block.angle, *block.velocity] + [block.angular_velocity]
    )
