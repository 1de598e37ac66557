"""The rows of `benchmark_inference`, and the clock of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from uwm_jax.benchmarking.timing import SETTLE_SECONDS
from uwm_jax.benchmarking.torch_inference import TORCH_SIDES

JAX = "jax"
SIDES = (JAX, *TORCH_SIDES)
WARM_UP = 3  # calls of each side before those that are timed
ROUND = 5  # calls of one side before it is the next one's turn

Calls = Callable[[int], list[float]]  # as `clock.calls` of some calls


class Row(NamedTuple):
    """One latency: a use, the number of cameras, and that of network evaluations; 0 for systems without steps."""

    use: str
    views: int
    steps: int

    @property
    def name(self) -> str:
        """`policy/3_views/10_steps`."""
        return f"{self.use}/{self.views}_views" + (f"/{self.steps}_steps" if self.steps else "")


def rows_of(uses: Sequence[str], views: Sequence[int], steps: Sequence[int]) -> list[Row]:
    """All combinations, those of a model next to each other."""
    return [Row(use, v, s) for v in views for s in steps for use in uses]


def in_turns(sides: Mapping[str, Calls], count: int) -> dict[str, list[float]]:
    """Seconds of `count` calls of each side, in rounds of `ROUND`, after `WARM_UP` calls of each.

    A pause before each round lets the idle threads of the others, which spin for a while, fall asleep.
    """
    for calls in sides.values():
        calls(WARM_UP)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for start in range(0, count, ROUND):
        for side, calls in sides.items():
            time.sleep(SETTLE_SECONDS)
            found[side] += calls(min(ROUND, count - start))
    return found
