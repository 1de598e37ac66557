"""Closed loop: the policy of a run acts in a simulator.

    python -m uwm_jax.rollout --workdir=DIR --env=pusht --episodes=50
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from uwm_jax.envs import Observation
from uwm_jax.system import System


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """One episode of T steps.

    Attributes:
        seed: of the start.
        scores: (T + 1,) float64, the environment's score at the start and after each step (PushT: coverage, 0 to 1).
        actions: (T, Da) float64, as the environment took them.
        success: whether the environment called it solved, which ends it.
        observations: {key: (T + 1, ...)} where `closed_loop(record=True)` asked for them, else empty.
    """

    seed: int
    scores: np.ndarray
    actions: np.ndarray
    success: bool
    observations: Observation

    @property
    def max_score(self) -> float:
        return float(self.scores.max())


def closed_loop(
    system: System,
    params: Any,
    frozen: Any,
    env: str,
    seeds: Sequence[int],
    *,
    execute: int = 8,
    seed: int = 0,
    workers: int = 0,
    progress: str = "",
    record: bool = False,
) -> list[EpisodeResult]:
    """Lets the policy mode of a model act in an environment, one episode from each of `seeds`.

    An episode is a function of (parameters, system, env, its seed, execute, seed) alone: neither the other episodes
    nor the number of workers changes it. `system` decides the sampler (`System.schedule`), so a number of steps or
    a rule is tried by giving another system.

    Args:
        env: name of the environment (`uwm_jax.envs`), e.g. "pusht".
        seeds: of the episodes' starts; PushT's evaluation starts at 100000.
        execute: steps of each sampled chunk that are taken before the next chunk is sampled.
        seed: of the sampler's noise, together with the episode's seed and the number of the decision.
        workers: processes that simulate; 0 = all cores, at most one per episode.
        progress: the progress bar's description; "" shows none.
        record: keep the observations.

    Returns:
        The episodes in the order of `seeds`.

    Raises:
        UserError: an unknown environment, a missing package, or a model that was trained on other inputs or actions
            than the environment has.
    """
    raise NotImplementedError
