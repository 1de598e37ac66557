"""Signals that tell a run to end: SIGTERM, Ctrl-C, SIGHUP, and a stdout whose reader is gone.

All of them are noted here, and obeyed where the run can be saved (`turns.py`). A signal that the process was started
to ignore (SIGHUP under nohup) stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from uwm_jax.ending import drop_output
from uwm_jax.errors import warn
from uwm_jax.reading import no_room

NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}

_previous: dict[int, Any] = {}  # handlers that `take` has replaced
_received: list[int] = []
_lost_output: list[str] = []
_full_output: list[OSError] = []  # the first one
_heeded = False  # whether turns look for what came
_cut: list[BaseException] = []  # what a second signal raises, inside of `may_be_cut`


def take(*numbers: int) -> None:
    """From here on these signals are noted, however often they come, until `restore`; by default all of `NAMES`.

    Signals that are ignored stay ignored. Only the main thread can take signals; elsewhere nothing happens. Without
    `numbers` they are for the turns of a run; before that they are `unheeded`.
    """
    global _heeded
    if threading.current_thread() is not threading.main_thread():
        return
    _heeded = _heeded or not numbers
    for number in numbers or NAMES:
        if number not in _previous and signal.getsignal(number) != signal.SIG_IGN:
            _previous[number] = signal.signal(number, _note)


def restore() -> None:
    """Gives back all that `take` took, and forgets what came."""
    global _heeded
    for number, handler in _previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's
    _heeded = False
    _previous.clear()
    _received.clear()
    _lost_output.clear()
    _full_output.clear()


def received() -> int | None:
    """The first signal that came since `take`."""
    return _received[0] if _received else None


def unheeded() -> int | None:
    """The same, as long as no turn would see it: while a run starts, when there is nothing to be saved."""
    return None if _heeded else received()


def lost_output() -> str | None:
    """Why stdout cannot be written, once that is so."""
    return _lost_output[0] if _lost_output else None


@contextlib.contextmanager
def may_be_cut(error: BaseException) -> Iterator[None]:
    """A block that may be left in the middle: the second of the signals raises `error` there."""
    _cut.append(error)
    try:
        yield
    finally:
        _cut.clear()


def say(*args: Any) -> None:
    """Prints at once, and raises nothing.

    A stdout that is gone (a closed pipe or terminal) is noted. A file on a full disk lacks lines until there is room,
    which is told once.
    """
    try:
        print(*args, flush=True)
    except OSError as e:
        if no_room(e):
            if not _full_output:
                _full_output.append(e)
                warn(f"stdout cannot be written ({e.strerror}): lines are missing in it. The run goes on.")
            return
        _lost_output.append(e.strerror or str(e))
        drop_output(sys.stdout)


def _note(number: int, _: Any) -> None:
    _received.append(number)
    if len(_received) > 1 and _cut:
        raise _cut.pop()
