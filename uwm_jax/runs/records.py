"""What one run writes while it trains: lines of metrics, evaluations, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from uwm_jax.evaluation.in_training import InTraining
from uwm_jax.files import Place
from uwm_jax.parallel.distributed import say
from uwm_jax.runs.loop import Records, Watch
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.flops import Mfu
from uwm_jax.training.metrics import MetricAccumulator
from uwm_jax.training.state import TrainState
from uwm_jax.training.telemetry.log import MetricsLog, progress_line


class Measured(NamedTuple):
    """What a run has to report of a step.

    Attributes:
      means: {metric: mean since the last line}.
      evaluated: {`eval/<metric>`: mean}.
      drawn: {`eval/<picture>`: file}.
    """

    means: dict[str, float]
    evaluated: dict[str, float]
    drawn: dict[str, Place]


@dataclasses.dataclass
class RunRecords(Records):
    """The records of one run.

    Attributes:
      workdir, total_steps, checkpoints, log, evaluations: of the run.
      frozen: arrays of the codec.
      codec_arrays: those that a checkpoint holds, None for none.
      position: step -> the data position after it, JSON.
      assets: of every checkpoint.
      mfu: of the model on its devices.
      watch: of the loop.
      accumulator: of the metrics since the last line.
    """

    workdir: Place
    total_steps: int
    checkpoints: Checkpoints
    log: MetricsLog
    evaluations: InTraining
    frozen: Any
    codec_arrays: Any
    position: Callable[[int], Mapping[str, Any]]
    assets: Mapping[str, Any]
    mfu: Mfu
    watch: Watch
    accumulator: MetricAccumulator = dataclasses.field(default_factory=MetricAccumulator)

    def add(self, step: int, metrics: Any) -> None:
        self.accumulator.add(step, metrics)

    def check(self) -> None:
        self.checkpoints.check()

    def evaluates(self, step: int) -> bool:
        return bool(self.evaluations.due(step))

    def report(self, step: int, state: TrainState) -> None:
        measured = self.measure(step, state)
        rates = self.watch.goodput.rates(step)
        rates |= self.mfu(rates["samples_per_second"])
        say(progress_line(step, self.total_steps, {**measured.means, **rates}))
        if measured.evaluated:
            say(self.evaluations.headlines(measured.evaluated))
        self.write(step, measured, rates)

    def measure(self, step: int, state: TrainState) -> Measured:
        """The means since the last report, and the evaluations that are due. Raises NotFinite."""
        means = self.accumulator.means()  # raises on NaN, so that none is ever saved
        with self.watch.goodput.spend("evaluation"):
            evaluated = self.evaluations.evaluate(
                self.workdir, step, state, self.frozen, self.watch.turns, self.watch.watchdog
            )
        return Measured(means, *evaluated)

    def write(self, step: int, measured: Measured, rates: Mapping[str, float]) -> None:
        """Writes the line of a step; `rates` as `Goodput.rates` has them."""
        with self.watch.goodput.spend("other"):
            logged = {name: rate for name, rate in rates.items() if name != "eta_seconds"}
            counts = self.watch.faults.metrics()
            self.log.write(step, {**measured.means, **logged, **counts, **measured.evaluated}, measured.drawn)

    def save(self, step: int, state: TrainState) -> None:
        progress = {"metrics": self.accumulator.state(), "goodput": self.watch.goodput.state(step)}
        self.log.sync()
        self.checkpoints.save(state, self.position(step), self.codec_arrays, {**self.assets, "progress": progress})
        if self.log.behind:  # lines that are nowhere, for steps that no continued run makes again
            self.checkpoints.wait()
            self.log.check()

    def wait(self) -> None:
        self.checkpoints.wait()
