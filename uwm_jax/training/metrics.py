"""Metrics of a training step, each of a type that says how steps are put together; and their accumulator."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax

from uwm_jax.errors import RunError


@flax.struct.dataclass
class Mean:
    """A metric that is averaged over steps; value () float32."""

    value: jax.Array


@flax.struct.dataclass
class Ratio:
    """A metric whose sum and count are added up over steps: their quotient, and none while the count is 0.

    Attributes:
      sum, count: () float32 each.
    """

    sum: jax.Array
    count: jax.Array


@flax.struct.dataclass
class Last:
    """A metric of which the last step's value counts; value () float32."""

    value: jax.Array


Metric = Mean | Ratio | Last


class NotFinite(RunError):
    """A metric became NaN or infinite; the message names the step and the metric."""


class MetricAccumulator:
    """Accumulates the device metrics of the steps since the last log line.

    Sums are float64, in the order of the steps, so that restoring a state gives bit-equal means.

    At most `ahead` steps are in flight: `add` fetches the one before, while the device computes the later ones.
    """

    def __init__(self, ahead: int = 2):
        self._ahead = ahead
        self._pending: collections.deque[tuple[int, Mapping[str, Metric]]] = collections.deque()
        self._empty()

    def _empty(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # {metric: (sum, steps or count)}
        self._last: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Adds the metrics of a step, of replicated arrays. Raises NotFinite for the step that it fetches."""
        self._pending.append((step, metrics))
        self._fetch(self._ahead)

    def check(self) -> None:
        """Waits for all steps and raises NotFinite for the first step with a metric that is not finite."""
        self._fetch(0)

    def _fetch(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            for name, metric in jax.device_get(dict(metrics)).items():
                total, count = (metric.sum, metric.count) if isinstance(metric, Ratio) else (metric.value, 1.0)
                total, count = float(total), float(count)
                if not math.isfinite(total) or not math.isfinite(count):
                    raise NotFinite(
                        f"step {step}: {name} is {total}. This step was not saved. A lower "
                        "config.optimizer.learning_rate or config.optimizer.clip_norm=1.0 often helps."
                    )
                if isinstance(metric, Last):
                    self._last[name] = total
                else:
                    before = self._sums.get(name, (0.0, 0.0))
                    self._sums[name] = (before[0] + total, before[1] + count)

    def means(self) -> dict[str, float]:
        """Every metric over the steps so far; starts anew.

        Ratios with count 0 are left out. Raises NotFinite as `check`.
        """
        self.check()
        means = {name: total / count for name, (total, count) in self._sums.items() if count} | self._last
        self._empty()
        return means

    def state(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint between two log lines. Raises NotFinite as `check`."""
        self.check()
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}, "last": dict(self._last)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state` returned."""
        self._sums = {name: (float(total), float(count)) for name, (total, count) in state["sums"].items()}
        self._last = {name: float(value) for name, value in state["last"].items()}
