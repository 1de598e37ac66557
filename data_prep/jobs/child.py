"""A process that runs one function, and is replaced when it crashes or exceeds a time limit."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from data_prep.jobs.workers import refused, start
from uwm_jax.errors import RunError

A = TypeVar("A")
R = TypeVar("R")
Mark = Callable[[int], None]

_START_SECONDS = 300.0  # that a new process may take to import what it needs
_ORPHAN_SECONDS = 60  # beyond the limit, after which a child ends by itself if its parent was killed meanwhile


class ChildError(Exception):
    """A call that did not return: `crashed` or else over the time limit; `mark` is the last one that was set."""

    def __init__(self, detail: str, crashed: bool, mark: int):
        super().__init__(detail)
        self.crashed, self.mark = crashed, mark


class Child(Generic[A, R]):
    """Calls one function in a process of its own, which serves call after call until one fails; a context manager.

    Args:
        function: called with an argument and with a function `mark(number)`, by which it tells how far it is. It is
            importable by name, what it takes and returns can be pickled, and it does not raise.

    Attributes:
        started: number of processes so far.
    """

    def __init__(self, function: Callable[[A, Mark], R]):
        self._function = function
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None
        self._mark: Any = self._context.RawValue("i", 0)
        self.started = 0

    def call(self, argument: A, seconds: float) -> R:
        """The function's result.

        Raises:
            ChildError: the process crashed or took more than `seconds`; the next call starts another one.
            RunError: no process can be started.
            RuntimeError: the function raised, with its traceback.
        """
        pipe = self._pipe or self._start()
        self._mark.value = 0
        try:
            pipe.send((argument, seconds))
            if not pipe.poll(seconds):
                raise self._failure(f"no result within {seconds:g} s", crashed=False)
            failed, result = pipe.recv()
        except (EOFError, ConnectionError) as e:
            raise self._failure(_ending(self._process), crashed=True) from e
        if failed:
            self.close()
            raise RuntimeError(f"in a child process:\n{result}")
        return result

    def close(self) -> None:
        """Ends the process; a later call starts another one."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.kill()
            process.join(10)  # one that waits for a dead disk cannot be killed: it is left behind

    def __enter__(self) -> Child[A, R]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> Connection:
        try:
            self._pipe, theirs = self._context.Pipe()
            with theirs:
                # daemon: ended with this process
                process = self._context.Process(target=_serve, args=(self._function, theirs, self._mark), daemon=True)
                process.start()
        except OSError as e:
            self.close()
            raise refused(e) from e
        self._process = process
        self.started += 1
        try:
            ready = self._pipe.poll(_START_SECONDS) and self._pipe.recv()
        except (EOFError, ConnectionError):
            ready = False
        if not ready:
            detail = _ending(self._process)
            self.close()
            raise RunError(f"a process for {self._function.__module__} did not start ({detail}): is there memory left?")
        return self._pipe

    def _failure(self, detail: str, crashed: bool) -> ChildError:
        error = ChildError(detail, crashed, self._mark.value)
        self.close()
        return error


def _ending(process: Any) -> str:
    """How a process ended that closed its pipe."""
    process.join(10)
    code = process.exitcode
    if code is None:
        return "it closed its pipe"
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _serve(function: Callable[[Any, Mark], Any], pipe: Connection, value: Any) -> None:
    start()
    pipe.send(True)  # everything is imported

    def mark(number: int) -> None:
        value.value = number

    while True:
        try:
            argument, seconds = pipe.recv()
        except EOFError:
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + _ORPHAN_SECONDS)
        try:
            result = (False, function(argument, mark))
        except Exception:
            result = (True, traceback.format_exc())
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(result)
