"""Turns: before each step, and each batch of an evaluation, all processes of a run agree whether to go on.

A process comes to a turn when it has all that it needs for what comes next; the turn is given when all have come, or
taken from all of them when one has a reason to end: a signal, data that cannot be read, data that does not come. So
whatever ends a run, every process holds the state after the same step and can take part in saving it, also one whose
read hangs. Process 0 decides; nothing but the coordination service is asked, and a turn passes while the devices are
busy with the steps before it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.parallel import company, signals
from uwm_jax.parallel.ahead import Ahead
from uwm_jax.parallel.company import Company, announce, status_of

NAMED_AFTER_SECONDS = 5.0  # a process that has waited so long for data is named when the run ends

_LOOK_SECONDS = 0.1  # how often a process that waits for its own data looks whether the turn is taken
_KINDS = ("signal", "error", "output", "hang")  # of the reasons of several processes the first kind is told

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Turn:
    """The same on all processes.

    Attributes:
      save: `every_minutes` have passed since the last save.
      end: raises where the run is to end now; makes the error from the last finished step, which has been saved.
      notes: what processes had to tell, JSON, by process.
    """

    save: bool = False
    end: Callable[[int], Exception] | None = None
    notes: Sequence[Any] = ()


class Left(Exception):
    """Raised to leave work in the middle, because the run ends: the next turn says why."""


class Turns:
    """The turns of a run, in the order of the program, which is the same on all processes.

        signals.take()
        with Turns(hang_seconds, every_minutes) as turns:
            for step in ...:
                turn = turns.next(batches)
                if turn.end:
                    save(step - 1)
                    raise turn.end(step - 1)
                batch = next(batches)

    Args:
      hang_seconds: the run ends when a process has waited so long for its data; 0 is never.
      every_minutes: how often `Turn.save` is true; 0 is never.

    An exception that leaves the context is announced to the other processes.
    """

    def __init__(self, hang_seconds: float, every_minutes: float = 0.0):
        self._hang_seconds, self._every_seconds = hang_seconds, 60 * every_minutes
        self._number = 0
        self._saved = time.monotonic()
        self._end: Turn | None = None

    def __enter__(self) -> Turns:
        self._saved = time.monotonic()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            announce(error)

    def next(self, source: Ahead[Any], notes: Callable[[], Any] = lambda: None) -> Turn:
        """Waits until all processes have their next item, or one has a reason to end. All must call it.

        Args:
          notes: gives what this process has to tell of its next item, JSON; None for nothing.
        """
        if self._end is None:
            wait = _Wait(source, self._hang_seconds, notes)
            self._number += 1
            verdict = self._alone(wait) if company.current is None else self._together(company.current, wait)
            if not verdict["end"]:
                return Turn(save=verdict["save"], notes=verdict["notes"])
            error = source.error  # now: a source that is closed forgets it
            self._end = Turn(end=lambda step: _error(verdict, error, step))
        return self._end

    def each(self, items: Iterator[_Item], waits_for: Callable[[], str] = lambda: "data") -> Iterator[_Item]:
        """The items of all processes, a turn for each; a thread makes them, one ahead.

        Raises:
          Left: the run is to end.
        """
        source = Ahead(items, 1, waits_for)
        try:
            while not self.next(source).end:
                try:
                    item = next(source)
                except StopIteration:
                    return
                yield item
        finally:
            source.close()
        raise Left

    def saved(self) -> None:
        """A checkpoint is being saved: `every_minutes` start anew."""
        self._saved = time.monotonic()

    def _alone(self, wait: _Wait) -> dict[str, Any]:
        pause = 0.0
        while not wait.ready(pause) and not wait.reason():
            pause = _LOOK_SECONDS
        return self._verdict([wait.report()])

    def _together(self, others: Company, wait: _Wait) -> dict[str, Any]:
        told: dict[str, Any] | None = None
        pause = 0.001
        while True:
            report = wait.report()
            if report != told:
                others.come(self._number, report)
                told = report
            if others.index == 0:
                reports = others.who_came(self._number)
                if any(r["reason"] for r in reports) or sum(r["ready"] for r in reports) == others.count:
                    verdict = self._verdict(reports)
                    others.give(self._number, verdict)
                    return verdict
                if report["ready"]:
                    time.sleep(pause)
                else:
                    wait.ready(pause)
                pause = min(1.5 * pause, _LOOK_SECONDS / 2)
            else:
                verdict = others.given(self._number, 5 * _LOOK_SECONDS if report["ready"] else 0.0)
                if verdict is not None:
                    return verdict
                if not report["ready"]:
                    wait.ready(_LOOK_SECONDS)

    def _verdict(self, reports: list[dict[str, Any]]) -> dict[str, Any]:
        reasons = [r["reason"] for r in reports if r["reason"]]
        end = min(reasons, key=lambda reason: _KINDS.index(reason["kind"]), default=None)
        waits = [r["waits"] for r in reports if r["waits"] and not (end and end["kind"] == "hang")]
        due = self._every_seconds > 0 and time.monotonic() - self._saved >= self._every_seconds
        notes = [r["notes"] for r in reports if r["notes"] is not None]
        return {"end": end, "waits": waits, "save": due and end is None, "notes": notes}


class _Wait:
    """One process's wait for its own data at a turn."""

    def __init__(self, source: Ahead[Any], hang_seconds: float, notes: Callable[[], Any]):
        self.source, self._hang_seconds, self._notes = source, hang_seconds, notes
        self._began = time.monotonic()

    def ready(self, seconds: float) -> bool:
        return self.source.ready(seconds)

    def report(self) -> dict[str, Any]:
        """This process's report on itself, JSON."""
        ready = self.ready(0.0)
        waited = 0.0 if ready else time.monotonic() - self._began
        waits = f"{_who()} had waited for {self.source.waits_for()}" if waited >= NAMED_AFTER_SECONDS else ""
        return {"ready": ready, "reason": self.reason(), "waits": waits, "notes": self._notes() if ready else None}

    def reason(self) -> dict[str, Any] | None:
        """Why this process wants the run to end."""
        number = signals.received()
        if number is not None:
            return self._reason("signal", f"told to end ({signals.NAMES[number]})", 128 + number)
        error = self.source.error
        if error is not None:
            known = isinstance(error, UserError | RunError)
            return self._reason("error", str(error) if known else f"{type(error).__name__}: {error}", status_of(error))
        lost = signals.lost_output()
        if lost is not None:
            return self._reason("output", f"stdout can no longer be written ({lost})", 1)
        if self._hang_seconds > 0 and time.monotonic() - self._began >= self._hang_seconds:
            if not self.ready(0.0):
                message = (
                    f"{_who()} got no data in {self._hang_seconds:g} s (config.hang_seconds); it waits for "
                    f"{self.source.waits_for()}"
                )
                return self._reason("hang", message, 1)
        return None

    @staticmethod
    def _reason(kind: str, message: str, status: int) -> dict[str, Any]:
        process = company.current.index if company.current else 0
        return {"kind": kind, "message": message, "status": status, "process": process}


def _who() -> str:
    return company.place() if company.current else "the run"


def _error(verdict: dict[str, Any], error: Exception | None, step: int) -> Exception:
    """The exception that ends a run after `step`; `error` is that of this process's own data."""
    reason = verdict["end"]
    here = company.current is None or reason["process"] == company.current.index
    if reason["kind"] == "error":
        if here and error is not None:
            return error
        kind = UserError if reason["status"] == 2 else RunError
        return kind(f"process {reason['process']} of {jax.process_count()} failed: {reason['message']}")
    saved = f"step {step} is saved; the same command continues from it." if step else "before the first step was done."
    if reason["kind"] == "signal":
        waited = "".join(f" {waits[0].upper()}{waits[1:]}." for waits in verdict["waits"])
        return Preempted(f"{reason['message']}: {saved}{waited}", reason["status"])
    return RunError(f"{reason['message']}. {saved[0].upper()}{saved[1:]}")
