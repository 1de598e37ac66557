"""Worker processes of `data_prep` commands."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from uwm_jax.errors import RunError


def pool(
    processes: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> concurrent.futures.ProcessPoolExecutor:
    """A pool of spawned processes that exit silently with the command, on Ctrl-C as well as if it is killed.

    As a context manager it raises RunError if one of its processes ended unasked, and the block failed of it; `submit`
    does so if the operating system starts none.

    Args:
      initializer: called once in each process with `initargs`; like submitted functions, importable by name.
    """
    context = multiprocessing.get_context("spawn")
    _shared.append(initargs)
    return _Pool(processes, context, start, (initializer, initargs))


_shared: list[Any] = []  # `initargs`: a shared number that ends with the block fails processes that are starting then


def refused(error: OSError) -> RunError:
    """What to tell where the operating system starts no further process."""
    return RunError(
        f"the operating system starts no further process ({error.strerror}). Rerun the same command with fewer "
        "--workers, or raise the limits of processes, open files and memory."
    )


class _Pool(concurrent.futures.ProcessPoolExecutor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        try:
            return super().submit(fn, *args, **kwargs)
        except OSError as e:  # it starts a process
            raise refused(e) from e

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        ended = super().__exit__(kind, value, trace)
        if isinstance(value, BrokenProcessPool):
            raise RunError(
                "a worker process was killed or crashed, perhaps because the memory is full. Rerun the same command, "
                "with fewer --workers."
            ) from value
        return ended


def start(initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()) -> None:
    """Prepares a new process: it ends silently on Ctrl-C, and with its parent."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # the command gets the signal too, and reports it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()  # otherwise a worker would wait for work forever
        os._exit(1)
