"""Processes that share the work of a `data_prep` command."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any


def pool(
    processes: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> concurrent.futures.ProcessPoolExecutor:
    """Fresh processes that end in silence with the command, by Ctrl-C as well as where it is killed.

    Args:
      initializer: called once in each process with `initargs`; as what is submitted, importable by name.
    """
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context, _start, (initializer, initargs))


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # the command has it too, and tells
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()  # without this a worker would wait for work for ever
        os._exit(1)
