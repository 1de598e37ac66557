"""The environment `pusht`, with its expert: a disc pushes a T-shaped block onto its goal.

Units are those of `uwm_jax.envs.pusht_simulator`: positions in pixels of a 512 x 512 board. The score is the coverage:
the share of the goal that the block covers, [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uwm_jax.envs import Controller, EnvSpec, Observation
from uwm_jax.envs.pusht_expert import PushTExpert
from uwm_jax.envs.pusht_simulator import BOARD, Renderer, load_gym_pusht, make_env, read_state
from uwm_jax.errors import UserError

MAX_STEPS = 300  # of an episode, as published evaluations have it


class PushT:
    """PushT as the demonstrations were made (`data_prep.demo`): the same starts from a seed, pictures and success.

    Observations: `image` (H, H, 3) uint8, if asked for, and `agent_pos` (2,) float32 in pixels of the board. Ends with
    success, at a coverage above 95 %, or after `MAX_STEPS`.

    Args:
        cameras: {"image": (H, H)}, or nothing for no picture.
    Raises:
        UserError: another camera, a frame that is not square, or gym-pusht is missing.
    """

    def __init__(self, cameras: Mapping[str, tuple[int, int]]):
        size = cameras.get("image", (0, 0))
        if set(cameras) - {"image"} or size[0] != size[1]:
            raise UserError(f"env pusht draws square frames of the camera 'image'; asked for {dict(cameras)}.")
        self.simulator = make_env()
        self.action_space = self.simulator.action_space
        self._render = Renderer(self.simulator, size[0]) if cameras else None
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Observation, dict[str, Any]]:
        self.simulator.reset(seed=seed)
        self._steps = 0
        return self._observe(), {"score": float(self.simulator._get_coverage()), "success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        # The agent is not held by the walls, so a target beyond the board would take it off the board.
        target = np.clip(np.asarray(action, np.float64), 0, BOARD)
        _, reward, success, _, info = self.simulator.step(target)
        self._steps += 1
        info = {"score": float(info["coverage"]), "success": bool(success)}
        return self._observe(), float(reward), bool(success), self._steps >= MAX_STEPS, info

    def close(self) -> None:
        self.simulator.close()

    def _observe(self) -> Observation:
        observation = {"agent_pos": read_state(self.simulator)[:2].astype(np.float32)}
        if self._render is not None:
            observation["image"] = self._render()
        return observation


class _Expert:
    def __init__(self) -> None:
        self._expert = PushTExpert()

    def reset(self, seed: int) -> None:
        self._expert.reset(seed)

    def act(self, env: PushT) -> np.ndarray:
        return self._expert.act(read_state(env.simulator))


def _make_expert() -> Controller:
    return _Expert()


SPEC = EnvSpec(
    name="pusht",
    make=PushT,
    check=load_gym_pusht,
    cameras=("image",),
    low_dim={"agent_pos": 2},
    action_dim=2,
    max_steps=MAX_STEPS,
    score="coverage",
    score_range=(0.0, 1.0),
    expert=_make_expert,
    action_limits=(0.0, BOARD),
    action_plane=("image", 0.0, BOARD, 0.0, BOARD),
)
