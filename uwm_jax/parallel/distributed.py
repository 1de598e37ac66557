"""Several processes as one run: who takes part, what they agree on, and how they end together.

A run of one process needs nothing of this, and every function here is then a no-op or trivial; `launch.py` says how
`session` finds the other processes.

`company.py` is how they talk, `signals.py` how a signal to one of them ends all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.parallel import company, signals
from uwm_jax.parallel.company import (
    AGREE_SECONDS,
    Company,
    announce,
    end_process,
    end_without_barrier,
    first_line,
    status_of,
)
from uwm_jax.parallel.launch import LAUNCH_FLAGS, find_launch

FLAGS = flags.FLAGS

JOIN_SECONDS = 300  # for all processes to start
LATE_SECONDS = 3600.0  # for all to come to a barrier before which some may compile or write for long
SILENCE_SECONDS = 60.0  # after which a process that shows no life is taken for dead


def define_flags() -> None:
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, when several processes share the run")
    flags.DEFINE_integer("num_processes", None, "how many processes share the run", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the run's processes and leaves in good order; an exception inside ends all of them.

    Raises:
        UserError: the flags or the environment name the processes only in part, or wrongly.
        RunError: instead of a collective's error, when that only shows that another process has failed.
    """
    initialize()
    try:
        yield
    except Preempted as preempted:  # all processes end here, at the same step
        with contextlib.suppress(RunError):  # all is saved; one that was killed while leaving takes nothing away
            shutdown(preempted.status)
        raise
    except BaseException as error:
        announce(error)
        cause = None
        if company.current is not None:
            cause = company.current.cause_of(error)
            company.current.close()
        end_without_barrier(status_of(cause or error))
        if cause is None:
            raise
        raise cause from error
    else:
        shutdown()


def initialize(join_seconds: int = JOIN_SECONDS, silence_seconds: float = SILENCE_SECONDS) -> None:
    """Joins the other processes; must run before anything else asks JAX for its devices.

    Ends the process with status 1 and a message when they cannot be reached in `join_seconds`.

    Args:
        silence_seconds: after which a process that shows no life is taken for dead.
    """
    given = {name: FLAGS[name].value if name in FLAGS else None for name in LAUNCH_FLAGS}
    launch = find_launch(given, os.environ)
    if launch is None:
        return
    # JAX aborts with a stack trace when its own time is up, so ours must be up first.
    with _give_up_after(join_seconds, f"{launch.described} could not join the run within {join_seconds} s"):
        try:
            jax.distributed.initialize(**launch.arguments, initialization_timeout=join_seconds + 60)
        except ValueError as e:
            if not launch.arguments:
                return  # a TPU without a pod around it
            raise UserError(f"{launch.described} cannot join the run: {e}") from e
        except jax.errors.JaxRuntimeError as e:
            raise RunError(  # it may pass: an earlier start of another process has yet to end
                f"{launch.described} cannot join the run: {first_line(e)}. Is the port of the coordinator's address "
                "free on the machine of process 0?"
            ) from e
    company.current = Company(silence_seconds)
    signals.take(signal.SIGTERM)  # one process that ends by itself would take the others with it


def shutdown(status: int = 1) -> None:
    """Leaves the other processes in good order, when all of them have come this far.

    Raises:
        RunError: not all did; this process will then end with `status`, without waiting for them once more.
    """
    if company.current is None:
        return
    company.current.stop()
    company.current = None
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as e:
        end_without_barrier(status)
        raise RunError(f"the run is complete, but not every process came to its end: {first_line(e)}") from e


def is_main() -> bool:
    """Whether this is the one process that writes text (and that orbax takes for the primary one)."""
    return company.current is None or jax.process_index() == 0


def say(*args: Any) -> None:
    """Prints on the main process only, at once. Where stdout is gone nothing is raised: a run ends at its next turn."""
    if is_main():
        signals.say(*args)


def agree(value: Any) -> Any:
    """The main process's value, which JSON must hold, on all processes. All must call it, in the same order."""
    if company.current is None:
        return value
    return next(theirs for main, theirs in company.current.exchange([is_main(), value]) if main)


def gather(value: Any) -> list[Any]:
    """Everybody's value, which JSON must hold, by process. All must call it, in the same order."""
    return [value] if company.current is None else company.current.exchange(value)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All must call it, in the same order; costs a round trip, so not in every
    step."""
    return any(gather(bool(flag)))


def require_same(what: str, value: Any) -> None:
    """Checks that `value`, which JSON must hold, is the same on all processes. All must call it, in the same order.

    Raises:
        UserError: on all processes; names `what`, who differs from process 0, and the first entry that does.
    """
    if company.current is None:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    digests = company.current.exchange(digest)
    others = [str(p) for p, theirs in enumerate(digests) if theirs != digests[0]]
    if not others:
        return
    values = company.current.exchange(value)
    main, other = _entries(values[0]), _entries(values[int(others[0])])
    key = min(key for key in main.keys() | other.keys() if main.get(key) != other.get(key))
    is_there, is_here = (f"{key}{' ' * bool(key)}is {entries.get(key, 'absent')[:200]}" for entries in (other, main))
    raise UserError(
        f"{what}: process {', '.join(others)} of {company.current.count} differs from process 0: {is_there} on process "
        f"{others[0]}, but {is_here} on process 0. Start all processes with the same command, files and data."
    )


def barrier(name: str, seconds: float = AGREE_SECONDS) -> None:
    """Waits until all processes are here.

    Raises:
        RunError: they were not within `seconds`; names the barrier and JAX's account of who is missing.
    """
    if company.current is not None:
        company.current.barrier(name, seconds)


def _entries(value: Any, name: str = "") -> dict[str, str]:
    """`{"a.b": "1"}` of `{"a": {"b": 1}}`; what is no dict is one entry, without a name."""
    if isinstance(value, dict) and value:
        inside = (_entries(v, f"{name}.{key}" if name else str(key)) for key, v in value.items())
        return {key: text for entries in inside for key, text in entries.items()}
    return {name: json.dumps(value)}


@contextlib.contextmanager
def _give_up_after(seconds: float, what: str) -> Iterator[None]:
    advice = "Start all processes with the same address and number, each with its own id, and let no firewall between."
    timer = threading.Timer(seconds, end_process, (f"error: {what}. {advice}", 1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
