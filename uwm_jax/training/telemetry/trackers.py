"""The trackers that `config.trackers` names, and how a run feeds them.

Each has a thread and a bounded queue of its own on the main process, so that one that
fails, hangs or is slow costs the run nothing but lines of that tracker, which are counted and told.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from uwm_jax.ending import leave_behind
from uwm_jax.errors import UserError, suggest, warn
from uwm_jax.files import AnyPath, Place, as_place
from uwm_jax.training.telemetry.tensorboard import TensorBoard
from uwm_jax.training.telemetry.tracker import CLOSE_SECONDS, RunFacts, Tracker
from uwm_jax.training.telemetry.wandb_tracker import Wandb

FLUSH_SECONDS = 30.0  # at most, from a line to the flush that makes it visible
QUEUE_LINES = 1000  # lines that may wait for a slow tracker

_OURS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class _Line(NamedTuple):
    step: int
    scalars: Mapping[str, float]
    pictures: Mapping[str, Place]


class _Feed:
    """The thread and the queue of one tracker."""

    def __init__(self, name: str, make: Callable[[], Tracker], run: RunFacts):
        self.name = name
        self._lines: collections.deque[_Line] = collections.deque()
        self._changed = threading.Condition()
        self._given = self._written = 0
        self._off = self._told_slow = self._ending = self._run_failed = False
        self._thread = threading.Thread(target=self._work, args=(make, run), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, line: _Line) -> None:
        self._given += 1
        slow = False
        with self._changed:
            if len(self._lines) < QUEUE_LINES and not self._off:
                self._lines.append(line)
                self._changed.notify()
            elif not self._off:
                slow, self._told_slow = not self._told_slow, True
        if slow:
            warn(
                f"config.trackers: {self.name} does not keep up: {QUEUE_LINES} lines wait for it. Lines are dropped "
                "while they do; the run goes on, and metrics.jsonl has every number."
            )

    def end(self, run_failed: bool) -> None:
        with self._changed:
            self._ending, self._run_failed = True, run_failed
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Waits for the thread, and tells how many lines it has not written."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        late = self._thread.is_alive()
        if late or self._off:  # what its library waits for at the end of the process may never come
            leave_behind(f"the tracker {self.name}")
        if lost := self._given - self._written:
            why = ": not all was written in time" if late and not self._off else ""
            warn(f"config.trackers: {self.name} lacks {lost} of {self._given} lines of this start{why}.")
        elif late:
            warn(f"config.trackers: {self.name} did not close in time.")

    def _work(self, make: Callable[[], Tracker], run: RunFacts) -> None:
        tracker = None
        try:
            tracker = make()
            tracker.start(run)
            flushed = time.monotonic() - FLUSH_SECONDS
            while not self._ended():
                if (line := self._next()) is not None:
                    tracker.log(*line)
                    self._written += 1
                if time.monotonic() - flushed >= FLUSH_SECONDS:
                    tracker.flush()
                    flushed = time.monotonic()
        except BaseException as e:  # also the SystemExit of a library: a thread has nobody to tell
            self._fail(e)
        try:
            if tracker is not None:
                tracker.close(self._run_failed)
        except BaseException as e:
            self._fail(e)

    def _ended(self) -> bool:
        with self._changed:
            return self._ending and not self._lines

    def _next(self) -> _Line | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ending, FLUSH_SECONDS)
            return self._lines.popleft() if self._lines else None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            was_off, self._off = self._off, True
            self._lines.clear()
        if not was_off:
            told = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            warn(
                f"config.trackers: {self.name} ends here ({' '.join(told.split())}). The run goes on, and "
                "metrics.jsonl has every number."
            )


class Trackers:
    """The trackers of one run.

    Args:
      makers: {name: class}, as `find` gives them.
      run: that they follow.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], run: RunFacts):
        self._feeds = [_Feed(name, make, run) for name, make in makers.items()]
        self._deadline: float | None = None

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Place] | None = None) -> None:
        """Queues a line for each tracker; waits for none. Pictures are read later."""
        for feed in self._feeds:
            feed.put(_Line(step, dict(scalars), dict(pictures or {})))

    def end(self, failed: bool = False, seconds: float = CLOSE_SECONDS) -> None:
        """Tells all trackers to end once they have written what is queued; `close` waits, for so long from now on.

        Args:
          failed: as `Tracker.close` has it.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + seconds
            for feed in self._feeds:
                feed.end(failed)

    def close(self, failed: bool = False, seconds: float = CLOSE_SECONDS) -> None:
        """The same, and waits; what has not ended in time is left behind."""
        self.end(failed, seconds)
        assert self._deadline is not None
        for feed in self._feeds:
            feed.join(self._deadline)


def start(config: ConfigDict, workdir: AnyPath, step: int, writes: bool, group: str = "") -> Trackers:
    """The trackers that `config.trackers` names, following a run from here on.

    Args:
      workdir, step, group: as in `RunFacts`.
      writes: False on all processes but one: no tracker is started.
    """
    run = RunFacts(workdir=as_place(workdir), config=config.to_dict(), step=step, group=group)
    return Trackers(find(config.trackers) if writes else {}, run)


def find(names: Sequence[str]) -> dict[str, type[Tracker]]:
    """The classes of trackers by name.

    Args:
      names: as in `config.trackers`.

    Raises:
      UserError: wandb is not installed, or a module or its class cannot be used.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError("config.trackers: 'wandb' needs a package that is not installed: pip install 'uwm-jax[wandb]'.")
    return {name: _OURS.get(name) or _imported(name) for name in names}


def _imported(name: str) -> type[Tracker]:
    module, colon, class_name = name.partition(":")
    if not colon:
        raise UserError(
            f"config.trackers: expected {', '.join(_OURS)} or package.module:Class, found {name!r}."
            f"{suggest(name, _OURS)}"
        )
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (Exception, SystemExit) as e:
        raise UserError(
            f"config.trackers: {name!r} cannot be imported ({type(e).__name__}: {e}). Expected package.module:Class of "
            "a module on the Python path (PYTHONPATH)."
        ) from e
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        raise UserError(
            f"config.trackers: {name!r} is {found!r}; expected a class derived from "
            "uwm_jax.training.telemetry.tracker.Tracker."
        )
    return found
