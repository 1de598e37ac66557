"""Retention: which checkpoints of a run stay on disk, decided by orbax's preservation policies.

The newest few always stay; besides them every Nth step, the one with the best value of an evaluation's metric, and the
last one before the learning rate decays, from which a longer run can go on. Values of metrics are those that the run
itself measured, read from its `metrics.jsonl`, so that a continued run decides as an uninterrupted one would.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from uwm_jax.errors import UserError, suggest
from uwm_jax.files import Place
from uwm_jax.training.state import decay_start
from uwm_jax.training.telemetry.log import read_metrics


@dataclasses.dataclass
class _Checkpoint:
    """A checkpoint with the attributes that orbax's policies read."""

    step: int
    metrics: dict[str, Any] | None
    time: datetime.datetime = datetime.datetime.min  # no policy used here asks for it


@dataclasses.dataclass(frozen=True)
class Retention:
    """The checkpoints to keep.

    Attributes:
      newest: how many of the newest; None keeps all.
      every: steps that are multiples of it stay too; 0: none.
      best: the checkpoint of the step with the best value of this metric of `metrics.jsonl` stays too, the later one of
        equal values; "": none. A step that was not evaluated has no value.
      mode: whether "min" or "max" is best.
      before: the newest checkpoint of at most this many steps stays too; None: none.
    """

    newest: int | None = None
    every: int = 0
    best: str = ""
    mode: str = "min"
    before: int | None = None

    @classmethod
    def of(cls, config: ConfigDict) -> Retention:
        """That of `config.checkpoint`, and of a schedule that decays at its end."""
        c = config.checkpoint
        return cls(c.keep, c.keep_every, c.keep_best, c.keep_best_mode, decay_start(config))

    def surplus(self, steps: Sequence[int], workdir: Place) -> list[int]:
        """Those of `steps` (ascending) whose checkpoints are not to be kept."""
        if self.newest is None or len(steps) <= self.newest:
            return []
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(self.newest)]
        if self.every:
            policies.append(checkpoint_managers.EveryNSteps(self.every))
        values: dict[int, dict[str, Any]] = {}
        if self.best:
            values = {line["step"]: line for line in read_metrics(workdir / "metrics.jsonl") if self.best in line}
            best = checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[self.best],
                reverse=self.mode == "min",  # orbax keeps the last ones in this order
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        found = [_Checkpoint(step, values.get(step)) for step in steps]
        context = checkpoint_managers.PreservationContext()
        kept = checkpoint_managers.AnyPreservationPolicy(policies).should_preserve(found, context=context)
        branch = max((step for step in steps if self.before is not None and step <= self.before), default=None)
        return [step for step, keeps in zip(steps, kept, strict=True) if not keeps and step != branch]

    def at_most(self, total_steps: int) -> int | None:
        """Most checkpoints that lie on disk at one time, with one that is being written; None: no limit."""
        if self.newest is None:
            return None
        others = bool(self.best) + (self.before is not None)
        return self.newest + 1 + (total_steps // self.every if self.every else 0) + others

    def check(self, measured: Iterable[str]) -> None:
        """Raises UserError where `best` is none of the metrics that evaluations in training measure."""
        names = sorted(measured)
        if self.best and self.best not in names:
            raise UserError(
                f"config.checkpoint.keep_best={self.best!r}: evaluations of this run do not measure it."
                f"{suggest(self.best, names)} They measure: {', '.join(names)}."
            )
