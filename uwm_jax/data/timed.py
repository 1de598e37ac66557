"""Reads that may take only so long."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from uwm_jax.ending import leave_behind

_Value = TypeVar("_Value")


def within(seconds: float, read: Callable[[], _Value], what: str) -> _Value:
    """`read()`, unless it takes longer than `seconds` (0: it may take any time).

    A read cannot be interrupted: one that takes too long is left behind in a thread of its own, with what it holds.

    Args:
        what: is read, for messages.
    Raises:
        TimeoutError: a passing error, which `reading.again` tries again. And what `read` raises.
    """
    if not seconds:
        return read()
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put((read(), None))
        except BaseException as e:  # noqa: BLE001 - raised below
            answer.put((None, e))

    threading.Thread(target=work, name="read", daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        leave_behind(what)
        raise TimeoutError(
            errno.ETIMEDOUT, f"no answer in {seconds:g} s (config.data.read_timeout_seconds)", what
        ) from None
    if error is not None:
        raise error
    return value
