"""The end of a process whose output is gone, of which a thread hangs in a read, or whose parent has ended."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import Any, NoReturn

EXIT_SECONDS = 15.0  # for what other modules do at exit

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_library = ctypes.CDLL(None) if sys.platform == "linux" else None  # here, not between fork and exec

_left: list[str] = []


def leave_behind(what: str) -> None:
    """Notes that a thread hangs, and in what: `exit_process` then does not wait for it."""
    _left.append(what)


def drop_output(stream: Any) -> None:
    """Sends what is left in a broken stdout or stderr to nowhere, so that the interpreter's end does not fail on it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none of the process's own: a notebook's, a test's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def last_words(message: str = "") -> None:
    """Prints to stderr and flushes, before a process ends without the interpreter; raises nothing without a reader."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, message and f"{message}\n")):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, or closed from the start
            stream.write(text)
            stream.flush()


def exit_process(status: int) -> NoReturn:
    """`sys.exit`, also where threads hang."""
    if not _left:
        sys.exit(status)
    timer = threading.Timer(EXIT_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
    last_words()
    atexit._run_exitfuncs()
    os._exit(status)


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """From now on this process gets a signal when its parent, of this pid, ends, in whatever way; on Linux alone."""
    if _library is not None:
        _library.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), number)
