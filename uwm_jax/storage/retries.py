"""Repeating calls after passing failures, within a time limit."""

from __future__ import annotations

import contextlib
import contextvars
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from uwm_jax.errors import warn

TOTAL_SECONDS = 180.0  # for one call with all its attempts
LONGEST_PAUSE = 30.0  # seconds between two attempts
QUIET_SECONDS = 2.0  # shorter pauses are not told

_Value = TypeVar("_Value")
_deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("deadline", default=None)


class Passing(Exception):
    """One attempt failed in a way that may go away.

    Attributes:
      status: the HTTP status; None if there was no answer.
      may_have_worked: the request may have been carried out although its answer was lost.
    """

    def __init__(self, cause: str, status: int | None = None, may_have_worked: bool = True):
        super().__init__(cause)
        self.status, self.may_have_worked = status, may_have_worked


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limits the calls of this thread in the block to this many seconds together; an outer, earlier limit stays."""
    ends, outer = time.monotonic() + seconds, _deadline.get()
    token = _deadline.set(ends if outer is None else min(outer, ends))
    try:
        yield
    finally:
        _deadline.reset(token)


def left(most: float) -> float:
    """Seconds that an attempt may take: `most`, or what is left of the limit of `within`, at least 0.1."""
    ends = _deadline.get()
    return most if ends is None else max(0.1, min(most, ends - time.monotonic()))


def repeat(
    attempt: Callable[[], _Value],
    what: str,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> _Value:
    """`attempt()`, repeated with growing pauses while it raises `Passing` and the time limit allows.

    Args:
      what: the call and its object, for warnings.

    Raises:
      Passing: the last attempt's, once no time is left.
    """
    began, pause, attempts = clock(), 0.5, 0
    ends = began + TOTAL_SECONDS
    if (limit := _deadline.get()) is not None:
        ends = min(ends, limit)
    while True:
        attempts += 1
        try:
            return attempt()
        except Passing as e:
            seconds = pause * random.uniform(0.5, 1.0)  # so that many processes do not come back at once
            if clock() + seconds >= ends:
                cause = f"{e} ({attempts} attempt{'s' * (attempts > 1)} in {clock() - began:.0f} s)"
                raise Passing(cause, e.status, e.may_have_worked) from e
            if seconds >= QUIET_SECONDS:
                warn(f"{what}: {e}; attempt {attempts + 1} in {seconds:.1f} s.")
        sleep(seconds)
        pause = min(2 * pause, LONGEST_PAUSE)
