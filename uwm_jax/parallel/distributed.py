"""Several processes as one run: who takes part, what they agree on, and how they end together.

A run of one process needs nothing of this, and every function here is then a no-op or trivial; `launch.py` says how
`session` finds the other processes.

Processes talk through JAX's coordination service, which process 0 runs; no agreement here touches the devices. A
process that fails tells the others why, and they end with its status. One that was killed can tell nobody: the
others learn it from a collective that breaks, or from its silence, and end with status 1. If it was process 0, the
service dies with it, and JAX ends the others itself, at once, with its own message (SIGABRT, status 134): neither
recoverable tasks nor anything else that `jax.distributed.initialize` of JAX 0.10 and 0.11 takes changes that.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import flags
from jax._src import distributed as jax_distributed  # the coordination client has no public name (orbax does the same)
from jax.experimental import multihost_utils

from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.parallel.launch import LAUNCH_FLAGS, find_launch

FLAGS = flags.FLAGS

JOIN_SECONDS = 300  # for all processes to start
SILENCE_SECONDS = 60.0  # after which a process that shows no life is taken for dead
AGREE_SECONDS = 600.0  # for all processes to reach the same line

_PREEMPTED_STATUS = 143  # as `cli` has it

_POLL_SECONDS = 1.0
_POLLS_PER_BEAT = 5
_OWN_ERROR_SECONDS = 3.0  # how long a process that hears of a failure may take to meet the same error itself
_CLOSE_SECONDS = 20.0  # how long a failing process may take to close its files
_CLOSE_SECONDS_LOST = 4.0  # the same when it fails because of another, which it can only wait for in vain
_LEAVE_SECONDS = 8.0  # how long a failing process 0 keeps the service up for the others to read why
_LEAVE_SECONDS_AFTER = _CLOSE_SECONDS + 2  # the same when another one failed first, and closes its files
# What the collectives of CPUs and GPUs and the coordination client say when the other side is gone.
_LOST_CONTACT = re.compile(r"gloo|nccl|unavailable|connection (reset|closed|refused)|socket closed|peer", re.I)


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
    except Preempted:  # all processes end here, at the same step
        with contextlib.suppress(RunError):  # all is saved; one that was killed while leaving takes nothing away
            shutdown(_PREEMPTED_STATUS)
        raise
    except BaseException as error:
        announce(error)
        cause = None
        if _company is not None:
            cause = _company.cause_of(error)
            with _ending:
                _company.closed = True
        _end_without_barrier(_status(cause or error))
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
    global _company
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
            raise UserError(
                f"{launch.described} cannot join the run: {_first_line(e)}. Is the port of the coordinator's address "
                "free on the machine of process 0?"
            ) from e
    _company = _Company(silence_seconds)


def shutdown(status: int = 1) -> None:
    """Leaves the other processes in good order, when all of them have come this far.

    Raises:
        RunError: not all did; this process will then end with `status`, without waiting for them once more.
    """
    global _company
    if _company is None:
        return
    _company.stop()
    _company = None
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as e:
        _end_without_barrier(status)
        raise RunError(f"the run is complete, but not every process came to its end: {_first_line(e)}") from e


def is_main() -> bool:
    """Whether this is the one process that writes text (and that orbax takes for the primary one)."""
    return _company is None or jax.process_index() == 0


def place() -> str:
    """`process 2 of 4`, for messages."""
    state = jax_distributed.global_state
    return f"process {state.process_id} of {state.num_processes}"


def say(*args: Any) -> None:
    """Prints on the main process only, at once."""
    if is_main():
        print(*args, flush=True)


def agree(value: Any) -> Any:
    """The main process's value, which JSON must hold, on all processes. All must call it, in the same order."""
    if _company is None:
        return value
    return next(theirs for main, theirs in _company.exchange([is_main(), value]) if main)


def gather(value: Any) -> list[Any]:
    """Everybody's value, which JSON must hold, by process. All must call it, in the same order."""
    return [value] if _company is None else _company.exchange(value)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All must call it, in the same order; costs a round trip, so not in every
    step."""
    return any(gather(bool(flag)))


def require_same(what: str, value: Any) -> None:
    """Checks that `value`, which JSON must hold, is the same on all processes. All must call it, in the same order.

    Raises:
        UserError: on all processes; names `what`, who differs from process 0, and the first entry that does.
    """
    if _company is None:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    digests = _company.exchange(digest)
    others = [str(p) for p, theirs in enumerate(digests) if theirs != digests[0]]
    if not others:
        return
    values = _company.exchange(value)
    main, other = _entries(values[0]), _entries(values[int(others[0])])
    key = min(key for key in main.keys() | other.keys() if main.get(key) != other.get(key))
    is_there, is_here = (f"{key}{' ' * bool(key)}is {entries.get(key, 'absent')[:200]}" for entries in (other, main))
    raise UserError(
        f"{what}: process {', '.join(others)} of {_company.count} differs from process 0: {is_there} on process "
        f"{others[0]}, but {is_here} on process 0. Start all processes with the same command, files and data."
    )


def barrier(name: str, seconds: float = AGREE_SECONDS) -> None:
    """Waits until all processes are here.

    Raises:
        RunError: they were not within `seconds`; names the barrier and JAX's account of who is missing.
    """
    if _company is not None:
        _company.barrier(name, seconds)


def announce(error: BaseException) -> None:
    """Tells the other processes that this one is failing, so that none waits for it; the first one to tell is heard.

    From here on this process ends within seconds, even if a file cannot be closed because others are gone.
    """
    if _company is not None and not isinstance(error, Preempted):
        _company.announce(error)


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
        if _company is None and threading.current_thread() is threading.main_thread():
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
        if _company is None:
            return self._times > 0
        self._asked += 1
        self._agreed = self._agreed or bool(multihost_utils.reached_preemption_sync_point(self._asked))
        return self._agreed

    def _take(self, *_: Any) -> None:
        self._times += 1
        if self._times == 2:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Company:
    """This process among the others: messages through the coordination service, and a thread that listens for them."""

    def __init__(self, silence_seconds: float):
        state = jax_distributed.global_state
        self._client: Any = state.client
        self.index, self.count = state.process_id, state.num_processes
        self.closed = False  # whether the session was left because of an error, with all files closed
        self._silence_seconds = silence_seconds
        self._round = itertools.count()
        self._barriers: dict[str, int] = {}
        self._stopped = threading.Event()
        self._failing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="other processes", daemon=True)
        self._thread.start()

    def exchange(self, value: Any) -> list[Any]:
        """Everybody's value, by process."""
        turn = next(self._round)
        self._client.key_value_set(f"uwm/exchange/{turn}/{self.index}", json.dumps(value))
        self.barrier("exchange", AGREE_SECONDS)
        found = {key.rsplit("/", 1)[1]: text for key, text in self._client.key_value_dir_get(f"uwm/exchange/{turn}/")}
        if self.index == 0 and turn > 0:  # which everybody has read, being here
            self._client.key_value_delete(f"uwm/exchange/{turn - 1}/")
        return [json.loads(found[str(p)]) for p in range(self.count)]

    def barrier(self, name: str, seconds: float) -> None:
        self._barriers[name] = use = self._barriers.get(name, 0) + 1
        here = f"uwm/barrier/{name}/{use}/"
        self._client.key_value_set(f"{here}{self.index}", "")
        try:
            self._client.wait_at_barrier(f"uwm/{name}/{use}", timeout_in_ms=int(seconds * 1000))
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                raise
            came = {key.rsplit("/", 1)[1] for key, _ in self._client.key_value_dir_get(here)}
            missing = [p for p in range(self.count) if str(p) not in came]
            raise RunError(
                f"barrier {name!r}: {self.count - len(missing)} of {self.count} processes came within {seconds:g} s; "
                f"process {', '.join(map(str, missing)) or 'none'} did not. The last output of those that did not come "
                "tells where they are."
            ) from e
        if self.index == 0:
            self._client.key_value_delete(here)

    def announce(self, error: BaseException) -> None:
        with self._lock:
            if self._failing.is_set():
                return
            self._failing.set()
        record = {
            "process": self.index,
            "status": _status(error),
            "lost": _is_lost_contact(error),
            "message": str(error) if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}",
        }
        self._publish(record)
        seconds = _CLOSE_SECONDS_LOST if record["lost"] else _CLOSE_SECONDS
        timer = threading.Timer(seconds, _end_now, (error, seconds))
        timer.daemon = True
        timer.start()

    def cause_of(self, error: BaseException) -> RunError | UserError | None:
        """What to report instead of an error that only shows that another process is gone."""
        if self.count == 1 or not _is_lost_contact(error):
            return None
        record = None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone too
            record = self._failure()
        if record is not None and not record["lost"]:
            return (UserError if record["status"] == 2 else RunError)(self._tell(record))
        return RunError(
            f"{place()} lost contact with another process, which has probably been killed: see the last output of all "
            f"processes, and continue from the last checkpoint with the same command. ({_first_line(error)})"
        )

    def leave(self) -> None:
        """The last thing before a failing process ends; process 0 ends after those that are still there."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"uwm/left/{self.index}", "", allow_overwrite=True)
            first = self._failure() or {"process": self.index, "lost": True}
            alive = first["process"] != self.index and not first["lost"] and not first.get("silent")
            deadline = time.monotonic() + (_LEAVE_SECONDS_AFTER if alive else _LEAVE_SECONDS)
            expected = self.count - bool(first.get("silent"))
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get("uwm/left/")) >= expected:
                    time.sleep(1.0)  # they say so just before they end
                    break
                time.sleep(0.1)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        beats: dict[int, tuple[str, float]] = {}  # of each process, and since when it is the same
        answered = time.monotonic()
        for turn in itertools.count():
            try:
                record = self._failure()
                if turn % _POLLS_PER_BEAT == 0:
                    self._client.key_value_set(f"uwm/beat/{self.index}", str(turn), allow_overwrite=True)
                    if self.index == 0:
                        self._look_for_silence(beats)
                answered = time.monotonic()
            except jax.errors.JaxRuntimeError as e:
                record = None
                if time.monotonic() - answered > self._silence_seconds:
                    record = {
                        "process": 0,
                        "status": 1,
                        "lost": True,
                        "message": f"cannot be reached ({_first_line(e)})",
                    }
            if record is not None and not self._stopped.is_set():
                self._follow(record)
                return
            if self._stopped.wait(_POLL_SECONDS):
                return

    def _look_for_silence(self, beats: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        found = {key.rsplit("/", 1)[1]: beat for key, beat in self._client.key_value_dir_get("uwm/beat/")}
        for process in range(self.count):
            beat = found.get(str(process), "")
            if process not in beats or beats[process][0] != beat:
                beats[process] = beat, now
            elif now - beats[process][1] > self._silence_seconds:
                silent = f"it showed no life for {self._silence_seconds:g} s; it was killed, or its machine is gone"
                self._publish({"process": process, "status": 1, "lost": False, "silent": True, "message": silent})
                return

    def _follow(self, record: Mapping[str, Any]) -> None:
        """Ends this process because of another one's failure, unless it is about to end because of its own."""
        if self._failing.is_set():
            return
        if self._failing.wait(_OWN_ERROR_SECONDS):
            return
        with _ending:
            if not self._failing.is_set():
                text = f"error: {self._tell(record)}\n{place()} ends too, since none can go on without the others."
                _end_process(text, record["status"])

    def _tell(self, record: Mapping[str, Any]) -> str:
        return f"process {record['process']} of {self.count} failed: {record['message']}"

    def _failure(self) -> dict[str, Any] | None:
        """The first failure, or, while none is known, the first loss of contact, which is the trace of one."""
        found = dict(self._client.key_value_dir_get("uwm/failure/"))
        text = found.get("uwm/failure/first") or found.get("uwm/failure/lost")
        return json.loads(text) if text else None

    def _publish(self, record: Mapping[str, Any]) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or nobody is left
            kind = "lost" if record["lost"] else "first"
            self._client.key_value_set(f"uwm/failure/{kind}", json.dumps(record))


_company: _Company | None = None


def _is_lost_contact(error: BaseException) -> bool:
    # Which of the three a broken collective raises depends on where it is noticed.
    kinds = (jax.errors.JaxRuntimeError, ValueError, RuntimeError)
    return isinstance(error, kinds) and bool(_LOST_CONTACT.search(str(error)))


def _entries(value: Any, name: str = "") -> dict[str, str]:
    """`{"a.b": "1"}` of `{"a": {"b": 1}}`; what is no dict is one entry, without a name."""
    if isinstance(value, dict) and value:
        inside = (_entries(v, f"{name}.{key}" if name else str(key)) for key, v in value.items())
        return {key: text for entries in inside for key, text in entries.items()}
    return {name: json.dumps(value)}


def _status(error: BaseException) -> int:
    return 2 if isinstance(error, UserError) else 1


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _end_without_barrier(status: int) -> None:
    """At exit JAX waits for all processes to shut down, which would hang now: the last thing before that is to exit."""
    if jax_distributed.global_state.client is not None:
        atexit.register(_end_process, "", status)


def _end_now(error: BaseException, seconds: float) -> None:
    """For a failing process that still waits for the others, e.g. to finish a checkpoint together."""
    error = (_company and _company.cause_of(error)) or error
    shown = isinstance(error, UserError | RunError)
    text = f"error: {error}" if shown else "".join(traceback.format_exception(error)).rstrip()
    with _ending:
        if _company and _company.closed:  # only the interpreter's own end takes so long: the caller tells of the error
            _end_process("", _status(error))
        _end_process(f"{text}\n{place()}: its open files could not be closed in {seconds:g} s.", _status(error))


_ending = threading.RLock()  # one thread ends the process and says why; the others wait for that, in silence


def _end_process(message: str, status: int) -> None:
    with _ending:
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if _company is not None:
            _company.leave()
        os._exit(status)


@contextlib.contextmanager
def _give_up_after(seconds: float, what: str) -> Iterator[None]:
    advice = "Start all processes with the same address and number, each with its own id, and let no firewall between."
    timer = threading.Timer(seconds, _end_process, (f"error: {what}. {advice}", 1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
