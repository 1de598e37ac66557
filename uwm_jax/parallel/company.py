"""One process among the others of its run, and how it ends when one of them fails.

Processes talk through JAX's coordination service, which process 0 runs; no agreement here touches the devices. A
process that fails tells the others why, and they end with its status. One that was killed cannot: the
others learn it from a collective that breaks, or from its silence, and end with status 1. If it was process 0, the
service dies with it, and JAX ends the others itself, at once, with its own message (SIGABRT, status 134): neither
recoverable tasks nor anything else that `jax.distributed.initialize` of JAX 0.10 and 0.11 takes changes that.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the coordination client has no public name (orbax does the same)

from uwm_jax.ending import last_words
from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.parallel import signals

AGREE_SECONDS = 600.0  # for all processes to reach the same line

_POLL_SECONDS = 1.0
_POLLS_PER_BEAT = 5
_OWN_ERROR_SECONDS = 3.0  # how long a process that hears of a failure may take to meet the same error itself
_STOP_SECONDS = 5.0  # for a question to the service that is under way when this process leaves
_CLOSE_SECONDS = 20.0  # how long a failing process may take to close its files
_CLOSE_SECONDS_LOST = 4.0  # the same when it fails because of another, which it can only wait for in vain
_LEAVE_SECONDS = 8.0  # how long a failing process 0 keeps the service up for the others to read why
_LEAVE_SECONDS_AFTER = _CLOSE_SECONDS + 2  # the same when another one failed first, and closes its files
# What the collectives of CPUs and GPUs and the coordination client say when the other side is gone.
_LOST_CONTACT = re.compile(r"gloo|nccl|unavailable|connection (reset|closed|refused)|socket closed|peer", re.I)


class Company:
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
        self._client.key_value_set(f"uwm_jax/exchange/{turn}/{self.index}", json.dumps(value))
        self.barrier("exchange", AGREE_SECONDS)
        found = {
            key.rsplit("/", 1)[1]: text for key, text in self._client.key_value_dir_get(f"uwm_jax/exchange/{turn}/")
        }
        if self.index == 0 and turn > 0:  # which everybody has read, being here
            self._client.key_value_delete(f"uwm_jax/exchange/{turn - 1}/")
        return [json.loads(found[str(p)]) for p in range(self.count)]

    def barrier(self, name: str, seconds: float) -> None:
        self._barriers[name] = use = self._barriers.get(name, 0) + 1
        here = f"uwm_jax/barrier/{name}/{use}/"
        self._client.key_value_set(f"{here}{self.index}", "")
        try:
            self._client.wait_at_barrier(f"uwm_jax/{name}/{use}", timeout_in_ms=int(seconds * 1000))
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

    def come(self, turn: int, report: Any) -> None:
        """This process is at a turn, and says so once more whenever its report (JSON) changes."""
        self._client.key_value_set(f"uwm_jax/turn/{turn}/at/{self.index}", json.dumps(report), allow_overwrite=True)

    def who_came(self, turn: int) -> list[Any]:
        """The reports of those who are at a turn, by process."""
        found = {key: text for key, text in self._client.key_value_dir_get(f"uwm_jax/turn/{turn}/at/")}
        return [json.loads(found[key]) for key in sorted(found, key=lambda key: int(key.rsplit("/", 1)[1]))]

    def give(self, turn: int, verdict: Any) -> None:
        """The decision at a turn (JSON); the main process decides, once."""
        self._client.key_value_set(f"uwm_jax/turn/{turn}/verdict", json.dumps(verdict))
        if turn > 2:  # whoever came to the turn before this one has read the one before that
            self._client.key_value_delete(f"uwm_jax/turn/{turn - 2}/")

    def given(self, turn: int, seconds: float) -> Any:
        """The decision at a turn; None where nothing is within `seconds`."""
        key = f"uwm_jax/turn/{turn}/verdict"
        try:
            if seconds > 0:
                return json.loads(self._client.blocking_key_value_get(key, timeout_in_ms=int(1000 * seconds)))
            return json.loads(self._client.key_value_try_get(key))
        except jax.errors.JaxRuntimeError as e:
            if "NOT_FOUND" in str(e) or "DEADLINE_EXCEEDED" in str(e):
                return None
            raise

    def announce(self, error: BaseException) -> None:
        with self._lock:
            if self._failing.is_set():
                return
            self._failing.set()
        record = {
            "process": self.index,
            "status": status_of(error),
            "lost": _is_lost_contact(error),
            "message": str(error) if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}",
        }
        self._publish(record)
        seconds = _CLOSE_SECONDS_LOST if record["lost"] else _CLOSE_SECONDS
        timer = threading.Timer(seconds, _end_now, (error, seconds))
        timer.daemon = True
        timer.start()

    def cause_of(self, error: BaseException) -> RunError | UserError | None:
        """The error to report instead of one that only shows that another process is gone."""
        if self.count == 1 or not _is_lost_contact(error):
            return None
        record = None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone too
            record = self._failure()
        if record is not None and not record["lost"]:
            return (UserError if record["status"] == 2 else RunError)(self._tell(record))
        return RunError(
            f"{place()} lost contact with another process, which has probably been killed: see the last output of all "
            f"processes, and continue from the last checkpoint with the same command. ({first_line(error)})"
        )

    def close(self) -> None:
        """The session is left because of an error, with all files closed."""
        with _ending:
            self.closed = True

    def leave(self) -> None:
        """The last thing before a failing process ends; process 0 ends after those that are still there."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"uwm_jax/left/{self.index}", "", allow_overwrite=True)
            first = self._failure() or {"process": self.index, "lost": True}
            alive = first["process"] != self.index and not first["lost"] and not first.get("silent")
            deadline = time.monotonic() + (_LEAVE_SECONDS_AFTER if alive else _LEAVE_SECONDS)
            expected = self.count - bool(first.get("silent"))
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get("uwm_jax/left/")) >= expected:
                    time.sleep(1.0)  # they say so just before they end
                    break
                time.sleep(0.1)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)

    def _listen(self) -> None:
        beats: dict[int, tuple[str, float]] = {}  # of each process, and since when it is the same
        answered = time.monotonic()
        for turn in itertools.count():
            try:
                record = self._failure()
                if turn % _POLLS_PER_BEAT == 0:
                    self._client.key_value_set(f"uwm_jax/beat/{self.index}", str(turn), allow_overwrite=True)
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
                        "message": f"cannot be reached ({first_line(e)})",
                    }
            if record is not None and not self._stopped.is_set():
                self._follow(record)
                return
            if (number := signals.unheeded()) is not None:
                self._obey(number)
                return
            if self._stopped.wait(_POLL_SECONDS):
                return

    def _look_for_silence(self, beats: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        found = {key.rsplit("/", 1)[1]: beat for key, beat in self._client.key_value_dir_get("uwm_jax/beat/")}
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
                end_process(text, record["status"])

    def _obey(self, number: int) -> None:
        """Ends all processes because of a signal that came while the run starts, which may take long, or hang."""
        message = f"told to end ({signals.NAMES[number]}) before the first step"
        self._publish({"process": self.index, "status": 128 + number, "lost": False, "message": message})
        with _ending:
            if not self._failing.is_set():
                end_process(f"{place()} was {message}.", 128 + number)

    def _tell(self, record: Mapping[str, Any]) -> str:
        return f"process {record['process']} of {self.count} failed: {record['message']}"

    def _failure(self) -> dict[str, Any] | None:
        """The first failure, or, while none is known, the first loss of contact, which is the trace of one."""
        found = dict(self._client.key_value_dir_get("uwm_jax/failure/"))
        text = found.get("uwm_jax/failure/first") or found.get("uwm_jax/failure/lost")
        return json.loads(text) if text else None

    def _publish(self, record: Mapping[str, Any]) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or none is left
            kind = "lost" if record["lost"] else "first"
            self._client.key_value_set(f"uwm_jax/failure/{kind}", json.dumps(record))


current: Company | None = None  # None in a run of one process


def place() -> str:
    """`process 2 of 4`, for messages."""
    state = jax_distributed.global_state
    return f"process {state.process_id} of {state.num_processes}"


def announce(error: BaseException) -> None:
    """Tells the other processes that this one is failing, so that none waits for it; the first one to tell is heard.

    From here on this process ends within seconds, even if a file cannot be closed because others are gone.
    """
    if current is not None and not isinstance(error, Preempted):
        current.announce(error)


def _is_lost_contact(error: BaseException) -> bool:
    # Which of the three a broken collective raises depends on where it is noticed.
    kinds = (jax.errors.JaxRuntimeError, ValueError, RuntimeError)
    return isinstance(error, kinds) and bool(_LOST_CONTACT.search(str(error)))


def status_of(error: BaseException) -> int:
    """The exit status of a process that an error ends."""
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def end_without_barrier(status: int) -> None:
    """At exit JAX waits for all processes to shut down, which would hang now: the last thing before that is to exit."""
    if jax_distributed.global_state.client is not None:
        atexit.register(end_process, "", status)


def _end_now(error: BaseException, seconds: float) -> None:
    """For a failing process that still waits for the others, e.g. to finish a checkpoint together."""
    error = (current and current.cause_of(error)) or error
    shown = isinstance(error, UserError | RunError)
    text = f"error: {error}" if shown else "".join(traceback.format_exception(error)).rstrip()
    with _ending:
        if current and current.closed:  # only the interpreter's own end takes so long: the caller tells of the error
            end_process("", status_of(error))
        end_process(f"{text}\n{place()}: its open files could not be closed in {seconds:g} s.", status_of(error))


_ending = threading.RLock()  # one thread ends the process and says why; the others wait for that, in silence


def end_process(message: str, status: int) -> None:
    with _ending:
        last_words(message)
        if current is not None:
            current.leave()
        os._exit(status)
