"""The orbax writer of checkpoints, for any number of processes, with one voice about failures: that of the run."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

SAVE_TIMEOUT_SECONDS = 20 * 60  # for all processes to have written one checkpoint

_ARRAY_ITEMS = ("params", "ema_params", "train_state", "codec")
_JSON_ITEMS = ("data_iter", "assets")


def make_writer(name: str = "") -> ocp.AsyncCheckpointer:
    """A writer of checkpoints with these items, or some of them; to be closed.

    Args:
      name: under which processes wait for each other: the same on all of them, and another for each of several writers
        that save at the same time.
    """
    # Named processes make orbax wait at barriers with timeouts instead of at device collectives without.
    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    shared = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes=processes, barrier_sync_key_prefix=name or None
    )
    background = ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_SECONDS)
    handlers: dict[str, Any] = {
        **{name: ocp.StandardCheckpointHandler(multiprocessing_options=shared) for name in _ARRAY_ITEMS},
        **{name: ocp.JsonCheckpointHandler(multiprocessing_options=shared) for name in _JSON_ITEMS},
    }
    composite = ocp.CompositeOptions(multiprocessing_options=shared, async_options=background)
    _silence_abandoned_writes()
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(composite_options=composite, **handlers),
        async_options=background,
        multiprocessing_options=shared,
    )


def _silence_abandoned_writes() -> None:
    """Keeps what follows a failed save from stderr, where its one message would drown.

    Orbax logs with a traceback what it raises as well; asyncio names the other writes that failed; and writes that
    end after orbax has given up find their event loop closed, which goes to `sys.unraisablehook`.
    """
    logging.getLogger("absl").addFilter(_no_orbax_error)
    logging.getLogger("asyncio").addFilter(_no_abandoned_write)
    if not _unraisablehooks:
        _unraisablehooks.append(sys.unraisablehook)
        sys.unraisablehook = _unless_abandoned


def _no_orbax_error(record: logging.LogRecord) -> bool:
    return not (record.levelno >= logging.ERROR and f"{os.sep}orbax{os.sep}" in record.pathname)


def _no_abandoned_write(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


_unraisablehooks: list[Any] = []


def _unless_abandoned(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _unraisablehooks[0](unraisable)
