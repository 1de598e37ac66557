"""Simulators that a policy can act in, behind gymnasium's `Env` interface, by name.

An environment is gymnasium's `reset(seed=...)` and `step(action)`, with observations keyed as the dataset's and two
more numbers in `info`: `score`, how good the state is, and `success`. `get(name)` says what there is of an
environment; the packages it needs are imported when one is made.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from uwm_jax.errors import UserError

Observation = dict[str, np.ndarray]

_MODULES = {"pusht": "uwm_jax.envs.pusht"}


class Env(Protocol):
    """The interface that rollouts use; a gymnasium `Env` of this kind fits.

    Attributes:
        action_space: with `low`, `high` (Da,), gymnasium's `Box`.
    """

    action_space: Any

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Observation, dict[str, Any]]:
        """Starts the episode that `seed` determines. Returns (observation, info), as `step` gives them."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes an action (Da,) in raw units.

        Returns:
            observation: {camera: (H, W, 3) uint8, low-dimensional key: (D,) float32}; reward; terminated; truncated
            (the time is up); info with `score`, a float, and `success`, a bool.
        """
        ...

    def close(self) -> None: ...


class Controller(Protocol):
    """Acts on an environment that it may look into; `reset` comes before each episode."""

    def reset(self, seed: int) -> None: ...

    def act(self, env: Any) -> np.ndarray:
        """The next action (Da,), raw units."""
        ...


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """An environment before it is made.

    Attributes:
        name: what `--env` calls it.
        make: {camera: (height, width)} of the frames to draw (none: no frames, faster) -> an `Env`.
        check: raises UserError where a package is missing.
        cameras, low_dim, action_dim: what it can show and takes: camera names, {key: D}, Da.
        max_steps: of an episode.
        score: what `info["score"]` is, a word for reports.
        score_range: the smallest and the largest possible score; the largest, or both, may be infinite.
        expert: makes a `Controller` that solves it; None where there is none.
        action_limits: the lowest and the highest number of an action, to which it cuts others; None: it cuts none.
        action_plane: (camera, x_low, x_high, y_low, y_high) where the first two columns of the action are a position
            in the rectangle that this camera shows, else None.
    """

    name: str
    make: Callable[[Mapping[str, tuple[int, int]]], Env]
    check: Callable[[], object]
    cameras: tuple[str, ...]
    low_dim: Mapping[str, int]
    action_dim: int
    max_steps: int
    score: str
    score_range: tuple[float, float] = (-math.inf, math.inf)
    expert: Callable[[], Controller] | None = None
    action_limits: tuple[float, float] | None = None
    action_plane: tuple[str, float, float, float, float] | None = None


def get(name: str, asked: str = "--env") -> EnvSpec:
    """The environment called `name`; `asked` is the flag or field that named it.

    Raises:
        UserError: an unknown name, or a package that the environment needs is missing.
    """
    if name not in _MODULES:
        raise UserError(f"{asked}={name}: there is no such environment. Known: {', '.join(sorted(_MODULES))}.")
    spec: EnvSpec = importlib.import_module(_MODULES[name]).SPEC
    spec.check()
    return spec
