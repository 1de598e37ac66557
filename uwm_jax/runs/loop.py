"""The loop of training steps, which a run and a sweep of runs share."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.data.faults import Faults
from uwm_jax.parallel import distributed, signals
from uwm_jax.parallel.distributed import say
from uwm_jax.parallel.turns import Turns
from uwm_jax.parallel.watchdog import Watchdog
from uwm_jax.training.goodput import Goodput
from uwm_jax.training.profile import Profile
from uwm_jax.training.startup import Startup
from uwm_jax.training.state import decay_start


class Records(abc.ABC):
    """What the loop writes: metrics, evaluations and checkpoints. All processes call all methods together."""

    @abc.abstractmethod
    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step, which may still be computed."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises where an asynchronous save has failed; costs nothing."""

    def is_over(self) -> bool:
        """Whether nothing is left to train, so that the loop ends before its last step; the same on all processes."""
        return False

    @abc.abstractmethod
    def evaluates(self, step: int) -> bool:
        """Whether `report` measures more than the losses after a step."""

    @abc.abstractmethod
    def report(self, step: int, state: Any) -> None:
        """Measures what is due after a step, and writes and prints its line. Raises NotFinite before a save."""

    @abc.abstractmethod
    def save(self, step: int, state: Any) -> None:
        """Starts a checkpoint of the state after `step` steps, whose buffers may be reused on return."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Blocks until the last checkpoint is durable."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """What goes with a loop from step to step.

    Attributes:
      turns: whether to go on, the same on all processes.
      watchdog: gets a beat of every step.
      goodput: the clock of the run; startup: that of this start.
      trace: of a few steps.
      faults: the bad records of the data.
    """

    turns: Turns
    watchdog: Watchdog
    goodput: Goodput
    startup: Startup
    trace: Profile
    faults: Faults

    @classmethod
    def begin(
        cls,
        config: ConfigDict,
        goodput: Goodput,
        startup: Startup,
        trace: Profile,
        faults: Faults,
        closing: contextlib.ExitStack,
    ) -> Watch:
        """Signals are taken from here on, until `closing`."""
        closing.callback(trace.close)
        signals.take()
        turns = closing.enter_context(Turns(config.hang_seconds, config.checkpoint.every_minutes))
        watchdog = closing.enter_context(Watchdog(config.hang_seconds))
        return cls(turns, watchdog, goodput, startup, trace, faults)


def loop(
    config: ConfigDict,
    train_step: Callable[..., Any],
    state: Any,
    frozen: Any,
    batches: Any,
    records: Records,
    start_step: int,
    watch: Watch,
) -> None:
    """Trains from `start_step` to `config.total_steps`.

    The order is fixed: a checkpoint holds the state after `step` steps and the data position before the next batch is
    drawn, so that both continue together.

    Args:
      train_step: (state, frozen, batch) -> (state, metrics), which reuses the state's buffers.
      batches: those of `start_step` and on.

    Raises:
      what the turns, the data and the records raise: the run is to end, and what it saved is complete.
    """
    goodput, turns, faults = watch.goodput, watch.turns, watch.faults
    # On CPUs a collective fails when another process comes to it half a minute later: there is none before.
    distributed.barrier("all are ready for the first step", distributed.LATE_SECONDS)
    watch.startup.reached("step")
    saved_step, decay_starts = start_step, decay_start(config)  # from its checkpoint a longer run can go on

    def save(step: int) -> None:
        with goodput.spend("checkpoint"):
            records.save(step, state)
            turns.saved()

    for step in range(start_step + 1, config.total_steps + 1):
        with goodput.spend("data_wait"):
            # The same on all processes, which hold the state after `step - 1`.
            turn = turns.next(batches, lambda step=step: faults.notes(step))  # type: ignore[misc]
            end = turn.end or faults.end(turn.notes)
        if (turn.save or end) and step - 1 > saved_step:
            saved_step = step - 1
            save(saved_step)
        if end:
            records.wait()
            raise end(step - 1)
        batch = next(batches)
        faults.take(step, turn.notes)
        with watch.trace.step(step, state.step):
            state, metrics = train_step(state, frozen, batch)
        if step == start_step + 1:
            say(watch.startup.summary(metrics))
        records.add(step, metrics)
        watch.watchdog.beat(step)
        records.check()
        if records.is_over():
            break

        due = step % config.checkpoint.every == 0 or step in (decay_starts, config.total_steps)
        if step % config.log_every == 0 or step == 1 or due or records.evaluates(step):
            records.report(step, state)
        if due:
            saved_step = step
            save(step)
    with goodput.spend("checkpoint"):
        records.wait()
    say(goodput.summary())
