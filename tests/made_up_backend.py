"""A backend in numpy whose actions say what it was given, and that keeps what it was asked."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from uwm_jax.backend import Arrays, Backend, Noise
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.robot import RobotActions
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.systems.base import Promised, Use

CHUNK = 8
SCALE = np.array([2.0, 4.0, 8.0], np.float32)
OFFSET = np.array([0.0, 0.0, 100.0], np.float32)


class Call(NamedTuple):
    inputs: dict[str, np.ndarray]
    noise: dict[str, Any]
    promised: Promised | None
    guided: bool


class MadeUpBackend(Backend):
    """Raw actions (B, Ta, 3): the newest state, 1000 times the place in the chunk counted from the present, the noise.

    Args:
        robot: the parts of its robot's action, as `RobotActions.from_json` takes them; None: it knows none.
        hold: calls of `sample` wait for it; None: they do not.
    """

    def __init__(
        self, robot: dict[str, Any] | None = None, can_promise: bool = True, hold: threading.Event | None = None
    ):
        self.config = base()
        window = self.config.data.window
        window.obs, window.action = (0, 1), tuple(range(CHUNK + 1))  # the first action lies before the present
        robots = {"arm": RobotActions.from_json(robot)} if robot else {}
        normalizer = Normalizer({"action": (SCALE, OFFSET)})
        self.spec = DataSpec(
            WindowSpec.from_config(window), {"front": (2, 2)}, {"state": 1}, 3, 0, normalizer, robots=robots
        )
        self.system, self.uses, self.acting = "made-up", {"policy": Use(makes=("action",))}, "policy"
        self.can_promise, self.step, self.parameters, self.hold = can_promise, 7, "raw", hold
        self.calls: list[Call] = []

    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        return {"action": (seed + 0.5 * np.asarray(seeds) + 0.01 * np.asarray(decisions)).astype(np.float32)}

    def sample(
        self,
        use: str,
        inputs: Any,
        noise: Noise,
        promised: Promised | None = None,
        *,
        guided: bool = False,
        actions_only: bool = False,
    ) -> Arrays:
        if self.hold is not None:
            assert self.hold.wait(60)
        assert use == "policy" and actions_only and set(inputs) == {"obs/front", "obs/state"}
        self.calls.append(Call(dict(inputs), dict(noise), promised, guided))
        rows = len(inputs["obs/state"])
        raw = np.zeros((rows, CHUNK + 1, 3), np.float32)
        raw[..., 0] = inputs["obs/state"][:, -1]
        raw[..., 1] = 1000 * np.arange(-1, CHUNK)
        raw[..., 2] = np.asarray(noise["action"])[:, None]
        if promised is not None:
            raw = np.where(promised.mask[..., None], promised.action * SCALE + OFFSET, raw)
        return {"action": raw, "action_normalized": (raw - OFFSET) / SCALE}

    def describe_sampling(self) -> dict[str, Any]:
        return {}


def seen(*states: float) -> dict[str, np.ndarray]:
    """An observation of rows whose state is known."""
    return {"front": np.zeros((len(states), 2, 2, 3), np.uint8), "state": np.array(states, np.float32)[:, None]}
