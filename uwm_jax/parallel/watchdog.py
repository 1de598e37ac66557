"""Prints what every thread is doing when a step hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from uwm_jax.parallel import company

_Item = TypeVar("_Item")

_LONGEST_WAIT = 3600.0  # seconds; the system's waits take no number of any size
_CLOSE_SECONDS = 5.0  # for a stderr without a reader

_STDERR = 2  # by number: a thread that hangs may hold the lock of sys.stderr


class Watchdog:
    """Prints the stacks of all threads to stderr when no `beat` comes for `seconds`, and once more after each further
    `seconds` without one. The run is left alone: a long compilation is no error.

        with Watchdog(config.hang_seconds) as watchdog:
            for step in ...:
                watchdog.beat(step)

    Args:
        seconds: 0 switches it off.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._step: int | None = None
        self._beaten = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beaten = time.monotonic()
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)

    def beat(self, step: int) -> None:
        """`step` is done. Costs the reading of a clock."""
        self._step = step
        self._beaten = time.monotonic()

    def each(self, step: int, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items, of which each that comes is a beat: what takes longer than a step, after `step`."""
        for item in items:
            self.beat(step)
            yield item

    def _watch(self) -> None:
        quiet_since = self._beaten
        while not self._done.wait(min(max(quiet_since + self._seconds - time.monotonic(), 0.01), _LONGEST_WAIT)):
            if self._beaten > quiet_since:
                quiet_since = self._beaten
            elif time.monotonic() >= quiet_since + self._seconds:
                self._dump()
                quiet_since += self._seconds

    def _dump(self) -> None:
        where = "before the first step" if self._step is None else f"since step {self._step}"
        silent = time.monotonic() - self._beaten
        header = f"watchdog: {company.place()}: nothing for {silent:.0f} s {where}. What all threads are doing:\n"
        with contextlib.suppress(OSError):  # whoever read stderr is gone
            os.write(_STDERR, header.encode())
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
