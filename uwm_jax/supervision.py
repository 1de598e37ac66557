"""When a command that has ended is started again: the rules of `uwm_jax.supervise`.

Nothing here imports jax: a supervisor is a small process next to the one that owns the accelerators.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from uwm_jax.ending import drop_output, end_with
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import Place
from uwm_jax.reading import cause_of
from uwm_jax.sweeps import record_file
from uwm_jax.training.checkpoints.steps import latest_step
from uwm_jax.training.goodput import duration
from uwm_jax.training.supervised import Start, Supervised

FINAL = (0, 2, 130)  # done; an unusable flag, config or file, which a restart does not mend; Ctrl-C
LONGEST_PAUSE = 300.0  # seconds
END_SECONDS = 25 * 60.0  # after a signal; longer than a save may take (`SAVE_TIMEOUT_SECONDS`)

_TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_REMEMBERED = 50  # starts of which the next one is told
_LOOK_SECONDS = 0.2  # how often a pause looks whether a signal has come


def flag_of(command: Sequence[str], name: str) -> str | None:
    """The value of the last `--name=VALUE` or `--name VALUE` of a command; None without one."""
    found = None
    for argument, after in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag.startswith("-") and flag.lstrip("-") == name:
            found = value if equals else after
    return found or None


class Child(Protocol):
    """A started command."""

    def wait(self) -> int:
        """Its exit status, 128 + n for signal n, once it has ended."""

    def send(self, number: int) -> None:
        """A signal to it."""


class Process:
    """A command as a child of this process, which ends when this one does, in whatever way.

    It has a session of its own, so that a terminal's Ctrl-C and SIGHUP reach it through `send` alone.

    Raises:
      UserError: the command cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self._killer: threading.Timer | None = None
        try:
            self._popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=functools.partial(end_with, os.getpid(), signal.SIGTERM),
            )
        except OSError as e:
            raise UserError(f"-- {command[0]}: cannot be started: {e.strerror}.") from e
        _say(f"process {self._popen.pid} is started")

    def wait(self) -> int:
        status = self._popen.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)  # what it started and left behind
        if self._killer is not None:
            self._killer.cancel()
        return status if status >= 0 else 128 - status

    def send(self, number: int) -> None:
        """The first signal is also the last call: what has not ended `END_SECONDS` later is killed."""
        self._popen.send_signal(number)
        if self._killer is None:
            self._killer = threading.Timer(END_SECONDS, self._popen.kill)
            self._killer.daemon = True
            self._killer.start()


class Workdir:
    """What there is to see of a run, or of a sweep of runs, from outside."""

    def __init__(self, place: Place):
        self._place = place
        self._best: dict[str, int] = {}  # the newest step ever seen, by member; that of a run under ""

    def look(self) -> bool:
        """Whether there is a durable checkpoint of a later step than at all looks before."""
        try:
            found = {name: latest_step(place) for name, place in self._runs().items()}
        except (OSError, UserError, RunError) as e:
            warn(f"{self._place}: checkpoints cannot be looked for ({cause_of(e)}): none counts as new.")
            return False
        new = {name: step for name, step in found.items() if step is not None and step > self._best.get(name, -1)}
        self._best |= new
        return bool(new)

    def newest(self) -> str:
        """`step 40`, for messages."""
        if not self._best:
            return "none"
        return f"step {max(self._best.values())}"

    def is_over(self) -> bool:
        """Whether this is a sweep of which all members have ended, done or diverged."""
        try:
            return self._is_sweep() and all(
                member["status"] in (record_file.DONE, record_file.DIVERGED)
                for member in record_file.read(self._place).values()
            )
        except (OSError, UserError, RunError) as e:
            warn(f"{self._place / record_file.FILE}: cannot be read ({cause_of(e)}).")
            return False

    def _is_sweep(self) -> bool:
        return (self._place / record_file.FILE).is_file()

    def _runs(self) -> dict[str, Place]:
        if not self._is_sweep():
            return {"": self._place}
        return {name: self._place / record_file.MEMBERS / name for name in record_file.read(self._place)}


class Supervisor:
    """Starts a command again and again, by the rules of `uwm_jax.supervise`.

    Args:
      start: starts the command with these variables in its environment.
      workdir: where it saves.
      restarts: how many in a row may pass without a new durable checkpoint.
      pause: seconds before the first of them; doubled for each further one, up to `LONGEST_PAUSE`.
      clock: Unix seconds.
    """

    def __init__(
        self,
        start: Callable[[Mapping[str, str]], Child],
        workdir: Workdir,
        restarts: int,
        pause: float,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._start, self._workdir, self._restarts, self._pause = start, workdir, restarts, pause
        self._clock, self._sleep = clock, sleep
        self._child: Child | None = None
        self._told: int | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Passes signals on to the command inside of it; those that this process ignores stay ignored."""
        previous = {
            number: signal.signal(number, self.tell) for number in _TOLD if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def tell(self, number: int, _: Any = None) -> None:
        """A signal came: it goes to the command, which is not started again."""
        self._told = self._told or number
        if self._child is not None:
            self._child.send(number)

    def run(self) -> int:
        """The exit status of the supervisor, once the command has ended for good.

        Raises:
          RunError: it ended abnormally again and again, without a new durable checkpoint.
        """
        self._workdir.look()
        since, earlier, without = self._clock(), list[Start](), 0
        while True:
            start = self._once(since, earlier)
            earlier.append(start)
            if self._told is not None or start.status in FINAL:
                return self._summed_up(since, earlier)
            if self._workdir.is_over():
                _say(f"all members of the sweep have ended, with status {start.status}: it is not started again")
                return self._summed_up(since, earlier)
            without = 1 if self._workdir.look() else without + 1
            lasted, newest = duration(start.ended - start.began), self._workdir.newest()
            if without > self._restarts:
                raise RunError(
                    f"the command ended with status {start.status} after {lasted}, and there is no newer checkpoint "
                    f"(newest: {newest}) after {self._restarts} restarts in a row, the bound (--restarts). Its last "
                    "output tells why it ends."
                )
            pause = min(self._pause * 2 ** (without - 1), LONGEST_PAUSE)
            _say(
                f"the command ended with status {start.status} after {lasted} (newest checkpoint: {newest}); restart "
                f"{without} of at most {self._restarts} until there is a newer one, in {pause:g} s"
            )
            if (number := self._told_within(pause)) is not None:
                return 128 + number

    def _once(self, since: float, earlier: Sequence[Start]) -> Start:
        began = self._clock()
        told = Supervised(since, began, tuple(earlier[-_REMEMBERED:]))
        child = self._child = self._start(told.environment())
        if self._told is not None:  # before there was somebody to pass it on to
            child.send(self._told)
        status = child.wait()
        self._child = None
        return Start(began, self._clock(), status)

    def _told_within(self, seconds: float) -> int | None:
        """Waits; returns early with the signal if one comes."""
        until = self._clock() + seconds
        while self._told is None and (left := until - self._clock()) > 0:
            self._sleep(min(left, _LOOK_SECONDS))
        return self._told

    def _summed_up(self, since: float, starts: Sequence[Start]) -> int:
        """The status of the last of the starts, after a line about all of them, if there are several."""
        wall = self._clock() - since
        down = wall - sum(start.ended - start.began for start in starts)
        if len(starts) > 1:
            _say(f"{len(starts)} starts in {duration(wall)}, {duration(down)} of them between two")
        return starts[-1].status


def _say(line: str) -> None:
    """Prints to stderr, where the command's own errors go; raises nothing without a reader."""
    try:
        print(f"supervisor: {line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_output(sys.stderr)
