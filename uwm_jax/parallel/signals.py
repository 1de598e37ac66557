"""Signals that tell a run to end, which all its processes do at the same step."""

from __future__ import annotations

import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

from uwm_jax.parallel import company
from uwm_jax.parallel.company import announce


class Preemption:
    """Takes SIGTERM, so that the loop can save and end between two steps.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.requested():

    Inside the context SIGTERM does nothing but to make `requested` true, twice; a third one ends the process at once,
    for the case that no step comes to its end any more. With several processes JAX takes SIGTERM from `initialize` on,
    however often it comes, and agrees on a step when any of them got it. An exception that leaves the context is
    announced to the other processes.
    """

    def __init__(self) -> None:
        self._times = 0
        self._asked, self._agreed = 0, False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        if company.current is None and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        if error is not None:
            announce(error)

    def requested(self) -> bool:
        """Whether to save and end now; the same on all processes, and true ever after.

        To be asked after every step, and within what takes longer than a step: all processes must ask at the same
        places of the program, since they agree on the number of a question. Costs a lock; the agreement runs beside
        the program, and one or two questions may pass before this is true.
        """
        if company.current is None:
            return self._times > 0
        self._asked += 1
        self._agreed = self._agreed or bool(multihost_utils.reached_preemption_sync_point(self._asked))
        return self._agreed

    def _take(self, *_: Any) -> None:
        self._times += 1
        if self._times == 2:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
