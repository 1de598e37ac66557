"""Accounting of a run's wall time: every second since `train` was called has one name.

  start       from the call to the first step: data, model, restoring
  compile     programs compiled ahead of the loop
  step        the steps themselves, and all of the loop that has no other name
  data_wait   waiting for the next batch
  evaluation  losses and all modes on held-out windows, and pictures of them
  checkpoint  as far as the loop waits for it (arrays are written in the background)
  other       writing metrics
  lost        steps that are done again, because the run was killed after its last checkpoint
  downtime    between the end of a process and its next start, by the clock of a supervisor (`uwm_jax.supervise`)

The totals are a run's, not a process's: they travel inside its checkpoints. Under a supervisor they add up to its wall
clock. Without one, unobserved time is in none of them: the time between the last logged line and a kill, and the time
until the next start.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from uwm_jax.training.supervised import Supervised

CATEGORIES = ("start", "compile", "step", "data_wait", "evaluation", "checkpoint", "other", "lost", "downtime")

_LOOP = ("step", "data_wait", "other")  # what every step takes part in
_PAUSES = ("evaluation", "checkpoint")  # what comes now and then, and an ETA must hold in store


class Goodput:
    """The clock of a run: named wall time, samples per second, the share of time in steps, an ETA.

    `start` runs from here to `begin`, then `step`; `spend` names anything else. Nothing waits for a device: programs
    must be compiled ahead (`spend("compile")` around `lower(...).compile()`), and what is asynchronous must be waited
    for inside of `step` (`MetricAccumulator` does it) before an evaluation or a save is timed.

    Args:
      total_steps: of the whole run.
      batch_size: global.
    """

    def __init__(self, total_steps: int, batch_size: int):
        self._total_steps, self._batch_size = total_steps, batch_size
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._made = time.time()
        self._stack = ["start"]
        self._mark = time.perf_counter()
        self._begun = self._line = (0, 0.0, 0.0)  # step, seconds of the loop, of these waiting for data
        self._known_pace: float | None = None

    def begin(
        self,
        step: int,
        state: Mapping[str, Any] | None = None,
        cut: Mapping[str, Any] | None = None,
        supervised: Supervised | None = None,
    ) -> None:
        """The loop starts.

        Args:
          step: the step that the run continues from; 0 for a new one.
          state: what `state` returned when that step was saved.
          cut: the last line of `metrics.jsonl` that lies after `step`: the time of an earlier start up to that line,
            as far as `state` does not hold it, is lost.
          supervised: what the supervisor told this process, whose start is then counted from there. Its earlier starts
            count instead of `cut`.
        """
        self._switch()
        self._stack = ["step"]
        saved = state["seconds"] if state else {}
        for name, seconds in saved.items():
            self._seconds[name] += seconds
        if supervised:
            self._seconds["start"] += max(self._made - supervised.began, 0.0)
        if supervised and supervised.earlier:
            for name, seconds in supervised.unseen(state.get("at") if state else None).items():
                self._seconds[name] += seconds
        elif cut:
            seen = sum(cut.get(f"time/{name}", 0.0) for name in CATEGORIES)
            self._seconds["lost"] += max(seen - sum(saved.values()), 0.0)
        self._known_pace = state["seconds_per_step"] if state else None
        self._begun = self._line = self._position(step)

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Wall time inside of it belongs to `category`, and not to what is around it."""
        if category not in self._seconds:
            raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
        self._switch()
        self._stack.append(category)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def rates(self, step: int) -> dict[str, float]:
        """Fields of a log line about time, after `step` steps.

        `samples_per_second` and `data_wait_fraction` are those since the last call, without pauses for evaluation,
        saves and compilation; `goodput` is the share of the run's wall time in steps; `time/<category>` are the
        seconds of the run; `eta_seconds` is what is left, with evaluation and saves at the rate they have had.
        """
        self._switch()
        now, (then, loop, waited) = self._position(step), self._line
        elapsed = max(now[1] - loop, 1e-9)
        self._line = now
        return {
            "samples_per_second": (step - then) * self._batch_size / elapsed,
            "data_wait_fraction": min((now[2] - waited) / elapsed, 1.0),
            "goodput": self._seconds["step"] / max(sum(self._seconds.values()), 1e-9),
            "eta_seconds": self.eta_seconds(step),
            **{f"time/{name}": round(seconds, 3) for name, seconds in self._seconds.items()},
        }

    def eta_seconds(self, step: int) -> float:
        """Seconds from `step` to the end of the run; NaN before anything is known of its pace.

        The pace is that of this start, or until it has made a step that of the start before.
        """
        pace = self._pace(step)
        if pace is None:
            return math.nan
        pauses = sum(self._seconds[name] for name in _PAUSES) / max(step, 1)
        return (self._total_steps - step) * (pace + pauses)

    def state(self, step: int) -> dict[str, Any]:
        """JSON that `begin` takes when the run continues from a checkpoint of `step`."""
        self._switch()
        return {"seconds": dict(self._seconds), "seconds_per_step": self._pace(step), "at": time.time()}

    def summary(self) -> str:
        """One line for people: `wall time 1:02:03: step 93.1 %, compile 2.0 %, ...`, the largest first."""
        self._switch()
        total = max(sum(self._seconds.values()), 1e-9)
        parts = sorted(self._seconds.items(), key=lambda item: -item[1])
        shares = ", ".join(
            f"{name.replace('_', ' ')} {100 * seconds / total:.1f} %"
            for name, seconds in parts
            if seconds >= 0.0005 * total
        )
        return f"wall time {duration(total)}: {shares}"

    def _switch(self) -> None:
        """Books the time since the last switch on the category that runs."""
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def _position(self, step: int) -> tuple[int, float, float]:
        return step, sum(self._seconds[name] for name in _LOOP), self._seconds["data_wait"]

    def _pace(self, step: int) -> float | None:
        """Seconds of the loop per step, in this start if it has made any."""
        then, loop, _ = self._begun
        return (self._position(step)[1] - loop) / (step - then) if step > then else self._known_pace


def duration(seconds: float) -> str:
    """`3:20` or `1:02:03`; `unknown` for what is not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
